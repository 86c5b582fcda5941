"""What a page names is there: links, headings, files, tests, modules and the programs of its commands."""

import ast
import posixpath
import re
from pathlib import Path

import pytest
import yaml

from scripts.site_pages import OUTSIDE, with_links_of_the_site
from tests.pages import PAGES, ROOT, anchors, without_fenced

LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.*-]*(/[\w.*-]+)*/?(::\w+)?")
SUFFIXES = (".py", ".md", ".toml", ".sh", ".slurm", ".svg", ".cff", ".yml")
# Folders that paths in the pages are relative to.
BASES = [ROOT, ROOT / "torchlmoe", ROOT / "tests", ROOT / "docs", ROOT / "kernels"]
# What a reader makes, or a program writes.
EXAMPLES = re.compile(
    r"(my_|FILE|import$|tensorboard/|outputs/|runs/|gdn|mixtures|test_FOLDER|config\.toml$|my\.toml$|.*gated_retention)"
)
PACKAGES = ("torchlmoe", "benchmarks", "tests", "scripts")
MODULE = re.compile(r"(?<![\w./-])((?:torchlmoe|benchmarks|tests)(?:\.[A-Za-z_]\w*)+)(?![\w/])")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def is_there(text: str, page: Path) -> bool:
    """Whether a path, which may have * in it and a test's name behind ::, leads anywhere."""
    path, _, test = text.partition("::")
    bases = [*BASES, page.parent]
    found = [file for base in bases for file in base.glob(path.rstrip("/"))] if path.strip("/") else []
    if not found and "/" not in path:
        found = [file for folder in ("torchlmoe", "kernels", "tests") for file in (ROOT / folder).rglob(path)]
    return any(not test or f"def {test}(" in file.read_text() for file in found)


def names_something(dotted: str) -> bool:
    """Whether a dotted name is a module, or a module and a name at its top level (with attributes behind it)."""
    parts = dotted.split(".")
    if parts[:2] == ["torchlmoe", "kernels"]:
        parts = parts[1:]
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        module = path / "__init__.py" if (path / "__init__.py").exists() else path.with_suffix(".py")
        if module.exists():
            return length == len(parts) or parts[length] in top_level(module)
        if path.is_dir() and length == len(parts):
            return True
    return False


def top_level(module: Path) -> set[str]:
    names = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def unknown_flags(text: str) -> list[str]:
    """Flags in commands of the text that their programs lack. Flags before a program are those of its launcher."""
    settings, parser = ((ROOT / name).read_text() for name in ("docs/settings.md", "torchlmoe/command.py"))
    found = []
    for command in re.findall(r"(?:train\.py|-m torchlmoe\.\w+)(?= )[^`#\n]*", text.replace("\\\n", " ")):
        program = command.split()[0 if command.startswith("train") else 1]
        source = (ROOT / program) if program == "train.py" else ROOT / f"{program.replace('.', '/')}.py"
        if not source.exists():  # `faults` names it
            continue
        program_text = source.read_text()
        program_text += parser if "add_model()" in program_text else ""
        for flag in re.findall(r"(?<=\s)--([\w.-]+)", command):
            name = re.sub(r"^model\.layers\.\w+\.", "model.layers.<letter>.", flag.removeprefix("tune."))
            of_custom_module = "--job.custom_modules" in command and "<letter>" in name
            is_known = f"`{name}`" in settings or of_custom_module if "." in flag else f'"--{flag}"' in program_text
            if not is_known and flag != "help":
                found.append(f"flag --{flag} of {program}")
    return found


def faults(text: str, page: Path) -> list[str]:
    """Names in the text of a page that the repository lacks."""
    found = []
    for target in LINK.findall(without_fenced(text)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        if not file.exists():
            found.append(f"link to {target}")
        elif anchor and anchor not in anchors(file):
            found.append(f"no heading {anchor} in {file.name}")
    for span in SPAN.findall(without_fenced(text)):
        span = re.sub(r"\[.*\]$", "", span)  # parameters of a test
        is_path = PATH.fullmatch(span) and span.partition("::")[0].endswith(("/", *SUFFIXES)) and span not in SUFFIXES
        if is_path and not EXAMPLES.match(span) and not is_there(span, page):
            found.append(f"path {span}")
    for path in re.findall(r"(?<![\w./-])(?:torchlmoe|benchmarks|train_configs|scripts|tests)/[\w./-]*\w", text):
        if not EXAMPLES.match(path) and not (ROOT / path).exists():
            found.append(f"path {path}")
    prose = re.sub(r"^    .*$", "", SPAN.sub("", without_fenced(text)), flags=re.MULTILINE)
    found += [f"{tag}, which HTML would swallow" for tag in re.findall(r"<[a-zA-Z][^>]*>?", prose)]
    imported = [f"{module}.{name}" for module, name in re.findall(r"from (torchlmoe[\w.]*) import (\w+)", text)]
    for module in [*MODULE.findall(text), *imported]:
        if not EXAMPLES.match(module) and not module.endswith(".py") and not names_something(module):
            found.append(f"module {module}")
    return found + unknown_flags(text)


@pages
def test_what_a_page_names_is_there(page):
    assert faults(page.read_text(), page) == []


@pytest.mark.parametrize(
    "text",
    [
        "[run](no_such_page.md)", "[run](run.md#no-such-heading)", "`torchlmoe/no_such_file.py`", "`ops/no_such.py`",
        "`no_such_file.py`", "`no_such_folder/`", "`tests/test_rooms.py::test_no_such`", "`torchlmoe.ops.no_such_name`",
        "    python -m torchlmoe.no_such_program --flag", "    from torchlmoe.ops import no_such_name",
        "    python train.py --training.no_such 3", "    python -m torchlmoe.plan \\\n        --no-such 3",
        "    train_configs/no_such.toml", "traces in <dump_folder>/profile",
    ],
)  # fmt: skip
def test_what_is_missing_is_found(text):
    assert len(faults(text, ROOT / "docs" / "run.md")) >= 1


def places(entry: object) -> list[str]:
    """The files of a navigation."""
    if isinstance(entry, dict):
        return [place for inner in entry.values() for place in places(inner)]
    return [place for inner in entry for place in places(inner)] if isinstance(entry, list) else [str(entry)]


def test_the_site_has_every_page_once_and_its_links_lead_to_pages():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = places(settings["nav"])
    docs = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert sorted(listed) == sorted([*docs, *(place for place in OUTSIDE.values() if place.endswith(".md"))])
    files = {path.name for path in (ROOT / "docs").iterdir()} | set(OUTSIDE.values())
    for page in PAGES:
        source = page.relative_to(ROOT).as_posix()
        for target in LINK.findall(with_links_of_the_site(page.read_text(), source)):
            path = target.partition("#")[0]
            assert "://" in target or not path or posixpath.normpath(path) in files, f"{source}: {target}"


def test_links_to_files_that_have_no_page_become_words():
    text = "[a](docs/run.md#data) [b](train.py) ![c](docs/run.svg) [d](https://x.org) [e](#data) [f](kernels/README.md)"
    expected = "[a](run.md#data) b ![c](run.svg) [d](https://x.org) [e](#data) [f](kernels.md)"
    assert with_links_of_the_site(text, "README.md") == expected
