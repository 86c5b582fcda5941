"""The exercise of docs/adding_a_mixer.md, followed to the letter, adds a mixer that passes the table of tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = command.split()
    assert program == "python"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def insert_below(path: Path, line: str, addition: str) -> None:
    text = path.read_text()
    (place,) = (match.end() for match in re.finditer(line, text, re.MULTILINE))
    path.write_text(text[:place] + "\n" + addition.rstrip("\n") + text[place:])


def code_of_the_exercise() -> list[str]:
    page = (ROOT / "docs" / "adding_a_mixer.md").read_text()
    return re.findall(r"^```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_exercise_adds_a_mixer(tmp_path):
    for folder in ("torchlmoe", "tests", "assets", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, imports, row, case, regenerate, command, *_ = code_of_the_exercise()
    (tmp_path / "torchlmoe/mixers/gated_retention.py").write_text(file)
    insert_below(tmp_path / "torchlmoe/mixers/__init__.py", r"^from .* import GatedDeltaNet$", imports)
    insert_below(tmp_path / "torchlmoe/mixers/__init__.py", r'^        "retention": .*$', row)
    insert_below(tmp_path / "tests/mixers/test_every_mixer.py", r'^    "retention": .*$', case)
    settings = run(regenerate.split(">")[0], tmp_path)
    assert "mixer = 'gated_retention'" in settings.stdout, settings.stderr
    result = run(f"{command} -p no:cacheprovider", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 6
