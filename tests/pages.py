"""The Markdown pages of the repository, as tests read them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "kernels" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fenced(text: str, language: str | None = None) -> list[str]:
    """Contents of the fenced code blocks, of one language if given."""
    return [code for name, code in _FENCE.findall(text) if language is None or name == language]


def without_fenced(text: str) -> str:
    return _FENCE.sub("", text)


def commands(code: str) -> list[list[str]]:
    """The words of each command in shell code; a backslash continues a line, # begins a comment."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def slug(heading: str) -> str:
    """The anchor that MkDocs and GitHub give to a heading in plain words."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


def anchors(path: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in without_fenced(path.read_text()).splitlines() if re.match("#+ ", line)}
