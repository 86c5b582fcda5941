"""A hook of MkDocs: pages of the site that lie outside of docs/, and links from pages to files that are not pages."""

import posixpath
import re
from pathlib import Path

# Files outside of docs/ -> their place in the site.
OUTSIDE = {
    "README.md": "index.md",
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/mixers.png": "mixers.png",
}
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")


def with_links_of_the_site(text: str, source: str) -> str:
    """Markdown whose relative links lead to pages of the site; a link to a file that has no page becomes its text.

    source: where the text lies in the repository, which its links are relative to.
    """

    def link(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in OUTSIDE:
            place = OUTSIDE[path]
        elif path.startswith("docs/"):
            place = path.removeprefix("docs/")
        else:
            return label
        return f"{image}[{label}]({place}{mark}{anchor})"

    return _LINK.sub(link, text)


def on_files(files, *, config):
    from mkdocs.structure.files import File  # a test imports this file without MkDocs

    root = Path(config.config_file_path).parent
    for source, place in OUTSIDE.items():
        if place.endswith(".md"):
            content = with_links_of_the_site((root / source).read_text(encoding="utf-8"), source)
            files.append(File.generated(config, place, content=content))
        else:
            files.append(File.generated(config, place, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown, *, page, config, files):
    if page.file.src_uri in OUTSIDE.values():
        return markdown
    return with_links_of_the_site(markdown, f"docs/{page.file.src_uri}")
