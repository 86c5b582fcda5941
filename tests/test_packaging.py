"""A wheel, installed without the repository, has kernels and assets, and adds no top-level package `kernels`."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECK = """
import importlib.resources, importlib.util
from pathlib import Path
import torchlmoe, torchlmoe.kernels, torchlmoe.mixers
from torchlmoe.data.tokenizer import load_tokenizer
assert load_tokenizer("embedded").vocab_size == 4096
embedded = importlib.resources.files("torchlmoe.assets") / "embedded"
assert sorted(file.name for file in embedded.iterdir()) == ["train.parquet", "validation.parquet"]
found = importlib.util.find_spec("kernels")
assert found is None or found.origin is None, found
from torchlmoe.vendoring.package import package_of
copied = package_of(["gated_deltanet"], Path("copied"), kernels_of_all=True)
assert "Apache License" in copied.files["LICENSE"] and "kernels/gates.py" in copied.files
assert any(requirement.startswith("torch>=") for requirement in copied.requirements)
print(torchlmoe.__file__)
"""


def test_wheel(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "tests"))
    # Isolated builds would fetch setuptools anew; the one here serves.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {CHECK}".replace("; \n", "\n")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(str(site))


def test_checkout():
    result = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_model_code_does_not_pull_in_what_it_does_not_need():
    """`torchlmoe.ops` and `torchlmoe.mixers` start without the training stack."""
    code = (
        "import sys, torchlmoe.mixers; print([m for m in ('datasets', 'tokenizers', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
