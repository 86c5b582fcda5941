"""Copies of parts: whole, no more than needed, and passing their own tests where torchlmoe cannot be imported."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from torchlmoe import vendor
from torchlmoe.mixers import MIXERS
from torchlmoe.vendoring.names import parts
from torchlmoe.vendoring.package import package_of
from torchlmoe.vendoring.sources import path_of

ROOT = Path(__file__).parent.parent
# Every process that Python starts there refuses torchlmoe.
REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchlmoe":
            raise ImportError(f"{name} must not be imported here.")

sys.meta_path.insert(0, Refuse())
"""
WITHOUT_KERNELS = """
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from copy_gated_deltanet.ops.kernel_backend import kernels_serve
from copy_gated_deltanet.ops.linear_recurrence import linear_recurrence


def test_without_kernels():
    with pytest.raises(ValueError, match="the kernels are not part of this copy .*; use 'chunked'"):
        linear_recurrence(*torch.ones(3, 1, 4, 1, 1), backend="triton")
    with FakeTensorMode():
        assert not kernels_serve("auto", torch.empty(1, device="cuda"))
"""
# Of each kind, what must make a copy's test fail: (file, text, text in its place).
MISTAKES = {
    "gated_deltanet": ("layers/recurrence.py", 'cache["state"].copy_(', 'cache["state"].add_('),
    "moe": (
        "feed_forwards/experts.py",
        "weighted_swiglu(gate_up_MF, weight_M)",
        "weighted_swiglu(gate_up_MF, weight_M * 0.99)",
    ),
    "causal_conv": ("ops/causal_conv.py", "x.index_fill_(1, (bounds - shift if", "x.index_fill_(1, (bounds - 1 if"),
    "kernel:gates": ("kernels/gates.py", "of_A_log += tl.sum(grad * s, 0)", "of_A_log += tl.sum(grad, 0)"),
    "ConvHalo": ("styles/halo.py", "y: y[:, width:]", "y: y[:, : y.shape[1] - width]"),
}
OFTEN = ("gated_deltanet", "mom", "moe", "causal_conv", "kernel:gates", "ConvHalo")


def folder_of(name: str) -> str:
    return f"copy_{name.replace(':', '_')}"


def copy(names, folder: Path, with_kernels: bool = False):
    package = package_of(names, folder, with_kernels)
    package.write(folder)
    return package


def results_of_tests(folder: Path) -> dict[str, list[tuple[str, bool]]]:
    """By package: its tests, and whether each has passed. One process runs them all."""
    refusing = folder / "refusing"
    refusing.mkdir()
    (refusing / "sitecustomize.py").write_text(REFUSE)
    report = folder / "report.xml"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
    environment = {**os.environ, "PYTHONPATH": str(refusing), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    found: dict[str, list[tuple[str, bool]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        package = case.attrib["classname"].split(".")[0]
        passed = case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
        found.setdefault(package, []).append((case.attrib["name"], passed))
    return found


def test_every_part_is_listed_and_has_a_test(capsys):
    found = parts()
    assert set(MIXERS) == {name for name, part in found.items() if part.kind == "mixer"}
    for part in found.values():
        assert path_of(part.check), part.check
    operations = [path.stem for path in (ROOT / "kernels").glob("*.py") if "custom_op(" in path.read_text()]
    kernels = {f"kernel:{name.removesuffix('_backward')}" for name in operations}
    assert kernels == {name for name, part in found.items() if part.kind == "kernel"}
    assert {"linear_recurrence", "packed_attention", "moe", "LSMSequenceParallel", "RunHalo"} <= set(found)
    vendor.main(["--list"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)


@cache
def imports_in(text: str) -> list[list[str]]:
    """Of each import in a file of a package: the modules that it may be of, one of which has to be there."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = f"copied.kernels{'.' * bool(node.module)}{node.module or ''}" if node.level else str(node.module)
            found += [[module, f"{module}.{alias.name}"] for alias in node.names]
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "with_kernels_and_styles"])
def test_a_copy_is_whole_and_no_more_than_needed(tmp_path, whole):
    """Of every part: each import is of a file that is there or of a package that is named, and no file is idle."""
    for name, part in parts().items():
        package = package_of([name], tmp_path / "copied", whole, whole)
        files = {path.removesuffix(".py").replace("/", "."): text for path, text in package.files.items()}
        modules = {module for module in files if f"{module.replace('.', '/')}.py" in package.files}
        packages = {module.removesuffix(".__init__") for module in modules}
        required = {requirement.split(">")[0] for requirement in package.requirements} | {"pytest"}
        reached = {"test_copied", "__init__"}
        reached |= {module.removeprefix("torchlmoe.") for module in part.modules}
        has_kernels, has_styles = (any(m.startswith(f"{room}.") for m in modules) for room in ("kernels", "styles"))
        assert has_kernels <= (whole or part.kind == "kernel")
        assert has_styles <= (whole or part.kind == "parallel style")
        assert has_styles or "_parallel_style" not in "".join(package.files.values())
        for module in modules:
            for candidates in imports_in(files[module]):
                top, _, rest = candidates[0].partition(".")
                if top != "copied":
                    assert top in required | sys.stdlib_module_names | {"triton"}, (name, module, top)
                elif has_kernels or not rest.startswith("kernels"):
                    there = {candidate.partition(".")[2] for candidate in candidates} & packages
                    assert there, (name, module, candidates)
                    reached |= there
        assert {module for module in modules if not module.endswith("__init__")} <= reached, name


def check_copies(folder: Path, names, mistakes) -> None:
    for name in names:
        copy([name], folder / folder_of(name))
    for name in mistakes:
        broken = folder / f"broken_{folder_of(name)}"
        copy([name], broken)
        file, text, wrong = MISTAKES[name]
        source = (broken / file).read_text()
        assert text in source, name
        (broken / file).write_text(source.replace(text, wrong))
    (folder / "test_without_kernels.py").write_text(WITHOUT_KERNELS)
    found = results_of_tests(folder)
    for name in names:
        assert len(found[folder_of(name)]) >= 1
        assert all(passed for _, passed in found[folder_of(name)]), (name, found[folder_of(name)])
    assert found["test_without_kernels"] == [("test_without_kernels", True)]
    for name in mistakes:
        assert not all(passed for _, passed in found[f"broken_{folder_of(name)}"]), name


def test_copies_pass_their_tests_and_fail_them_where_they_are_broken(tmp_path):
    check_copies(tmp_path, OFTEN, ("gated_deltanet", "causal_conv", "kernel:gates"))


@pytest.mark.long
def test_every_copy_passes_its_test(tmp_path):
    check_copies(tmp_path, [name for name in parts() if name not in OFTEN] + ["gated_deltanet"], MISTAKES)


@pytest.mark.long
def test_many_parts_in_one_package_with_kernels(tmp_path):
    """They import each other's files, in a folder that lies in a package. One style is there for all."""
    inside = tmp_path / "fork" / "models"
    inside.mkdir(parents=True)
    for parent in (inside, inside.parent):
        (parent / "__init__.py").touch()
    names = [name for name, part in parts().items() if part.kind != "parallel style" or name == "ConvHalo"]
    copy(names, inside / "many", with_kernels=True)
    found = results_of_tests(tmp_path)
    assert len(found["fork"]) > 150
    assert all(passed for _, passed in found["fork"]), [name for name, passed in found["fork"] if not passed]


def test_gated_deltanet_takes_few_lines(tmp_path):
    package = package_of(["gated_deltanet"], tmp_path / "copied", False)
    assert sum(package.num_lines().values()) <= 2600, package.num_lines()


def test_what_the_program_prints_and_writes(tmp_path, capsys):
    folder = tmp_path / "gates"
    vendor.main(["kernel:gates", "weighted_swiglu", "--output", str(folder)])
    printed = capsys.readouterr().out
    lines = {path.relative_to(folder).as_posix(): path.read_text().count("\n") for path in folder.rglob("*.py")}
    for path, count in lines.items():
        assert f"{count:6,}  {path}\n" in printed
    assert f"{sum(lines.values()):,}  lines of Python in {folder}, which needs torch>=" in printed
    readme = (folder / "README.md").read_text()
    assert "torchlmoe 0.1.0" in readme
    assert all(f"`{path}`" in readme for path in lines)
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "weighted_swiglu" in (folder / "__init__.py").read_text()


def test_bad_requests_are_refused_with_a_sentence(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    for arguments, message in [
        (["gated_deltanett", "--output", "x"], "'gated_deltanett' is not a mixer.*; the nearest are gated_deltanet,"),
        (["#", "--output", "x"], r"'#' is not a mixer, operation, kernel or style of torchlmoe \(--list prints"),
        (["moe", "--output", str(tmp_path / "my-moe")], "'my-moe' is not a name that Python can import; choose"),
        (["moe", "--output", str(tmp_path / "class")], "'class' is not a name that Python can import"),
        (["moe", "--output", str(tmp_path / "torch")], "'torch' is the name of another package; choose another"),
        (["moe", "--output", str(taken)], "taken exists and is not an empty folder; choose another"),
        (["moe", "--output", str(taken / "file")], "file exists and is not an empty folder; choose another"),
        (["moe"], "Give a NAME, or several, and --output FOLDER"),
        (["--output", "x"], "Give a NAME, or several, and --output FOLDER"),
    ]:
        with pytest.raises(ValueError, match=message):
            vendor.main(arguments)
    assert list(tmp_path.iterdir()) == [taken]
    taken = tmp_path / "empty"
    taken.mkdir()
    vendor.main(["weighted_swiglu", "--output", str(taken)])
