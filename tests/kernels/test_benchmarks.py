"""The programs that measure kernels run, here on tiny sizes; benchmarks/gpu.sh continues where it was interrupted."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from benchmarks import first, report, wheels
from benchmarks.operations import OPERATIONS, OURS, PLAIN
from benchmarks.tune_kernels import LookedUp, agrees, climb

ROOT = Path(__file__).parents[2]


def run(*command: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """Without a GPU, where sizes are tiny, and outside of the interpreter, where kernels take long."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | changed
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_measures_kernels(tmp_path):
    output = tmp_path / "figures.json"
    arguments = "--operations KDA Mamba --by torchlmoe PyTorch --repeats 1 --output".split()
    result = run(sys.executable, "-m", "benchmarks.kernels", *arguments, str(output))
    assert result.returncode == 0, result.stderr
    record = json.loads(output.read_text())
    assert len(record["rows"]) == 4
    assert not record["failures"]
    assert {"torch", "triton", "ptxas", "driver", "gpu"} <= record["machine"].keys()
    for row in record["rows"]:
        assert row.get("error", 0) < 1e-2
        assert None not in row.values()


@pytest.mark.long
def test_first_minutes_are_rehearsed(tmp_path):
    result = run("bash", "benchmarks/gpu.sh", "--first", "--rehearse", OUT=str(tmp_path), PYTHON=sys.executable)
    assert result.returncode == 0, result.stdout + result.stderr
    pieces = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "first").glob("*.json")}
    assert pieces.keys() == {"ceilings", "check", "speed", "decode", "training", "sweep"}
    for piece in pieces.values():
        assert piece["finished"]
        assert not piece["failures"]
        assert {"torch", "triton", "gpu"} <= piece["machine"].keys()
        assert piece["clock"].endswith("rehearsal")
        assert piece["rows"]
    checked = {row["operation"]: row["passed"] for row in pieces["check"]["rows"] if "passed" in row}
    assert [row["size"] for row in pieces["check"]["rows"] if "passed" not in row] == [
        str(size) for size in (first.REHEARSED.anchor, first.REHEARSED.shared, first.REHEARSED.decode)
    ]
    assert checked == {name: True for name, each in OPERATIONS.items() if {OURS, PLAIN} <= each.ways.keys()}
    assert len(pieces["speed"]["rows"]) == len(first.TIMED) + 2  # softmax attention, and shared key heads
    assert {"tokens/s", "MFU", "peak GiB"} <= pieces["training"]["rows"][0].keys()


def a_row(name):
    yield {"operation": name}


def a_row_and_an_error():
    yield {"operation": "half"}
    raise RuntimeError("CUDA error: an illegal memory access")


def a_row_and_no_end():
    yield {"operation": "stuck"}
    time.sleep(1000)


def a_death():
    os._exit(9)
    yield {}


def test_a_case_that_fails_ends_alone(tmp_path):
    """An error, a hang and a dead process are named, what they had done is kept, and the case behind them runs."""
    good, late = (first.Case(name, a_row, (name,)) for name in ("good", "late"))
    wrong = first.Case("wrong", a_row_and_an_error, ())
    dead, stuck = first.Case("dead", a_death, ()), first.Case("stuck", a_row_and_no_end, ())
    deadline = time.monotonic() + 100
    record = first.run_piece(first.Piece("tried", 90.0, [good, wrong, dead]), tmp_path, {"machine": {}}, deadline)
    assert json.loads((tmp_path / "tried.json").read_text()) == record
    assert [row["operation"] for row in record["rows"]] == ["good", "half"]
    assert record["failures"] == {
        "wrong": "RuntimeError: CUDA error: an illegal memory access",
        "dead": "its process ended with exit code 9",
    }
    assert record["finished"]
    record = first.run_piece(first.Piece("limited", 8.0, [stuck, late]), tmp_path, {}, deadline)
    assert [row["operation"] for row in record["rows"]] == ["stuck", "late"]
    assert record["failures"] == {"stuck": "stopped at its time limit of 4 s"}
    assert record["finished"]
    over = first.run_piece(first.Piece("over", 4.0, [good]), tmp_path, {}, time.monotonic())
    assert over["not done"] == ["good"]
    assert not over["finished"]


def test_a_process_that_ends_is_an_error():
    with pytest.raises(RuntimeError, match="A benchmark's process ended before it answered"):
        report.Worker(os._exit, 3)


def test_a_broken_gpu_or_toolchain_leaves_what_was_measured(monkeypatch):
    """After an illegal access every call of CUDA raises, and a Triton may lack a tool."""

    def raises() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    notes: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # imports the compiler
    assert report.attempt(notes, lambda: 3) == 3
    assert report.attempt(notes, raises) is None
    assert notes == ["RuntimeError: CUDA error: an illegal memory access"]
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs, "nvidia", SimpleNamespace(ptxas=SimpleNamespace(version="12.8")))
    assert report._ptxas_versions() == {"ptxas": "12.8"}


def test_a_check_that_fails_is_a_row_and_the_next_one_runs(monkeypatch):
    """A kernel that does not compile in one dtype does not keep the others from being tried."""

    def fails(**arguments):
        raise RuntimeError("out of resource: shared memory")

    operation = OPERATIONS["GLA"]
    broken = replace(operation, ways=operation.ways | {OURS: replace(operation.ways[OURS], run=fails)})
    monkeypatch.setitem(OPERATIONS, "GLA", broken)
    rows = list(first.check("GLA", replace(first.REHEARSED, checked=("bfloat16", "float32"))))
    assert [(row["dtype"], row["passed"], row["failure"]) for row in rows] == [
        (dtype, False, "RuntimeError: out of resource: shared memory") for dtype in ("bfloat16", "float32")
    ]


def test_kernels_are_rehearsed_without_what_only_training_needs():
    with pytest.raises(ModuleNotFoundError, match="pydantic"):
        first._Absent().find_spec("pydantic.fields")
    assert first._Absent().find_spec("torchlmoe.ops") is None


def wheel(folder, name, metadata):
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr(f"{name.split('-')[0]}.dist-info/METADATA", metadata)


def test_wheels_that_do_not_fit_are_named(tmp_path):
    assert "holds no wheels" in wheels.faults(tmp_path)[0]
    wheel(
        tmp_path,
        "good-1.0-py3-none-any.whl",
        'Requires-Dist: numpy\nRequires-Dist: other>=2\nRequires-Dist: x; extra == "y"',
    )
    wheel(tmp_path, "other-2.1-cp312-cp312-manylinux_2_28_x86_64.whl", "Requires-Python: >=3.10")
    assert wheels.faults(tmp_path) == []
    wheel(tmp_path, "old-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", "Requires-Python: <3.12")
    wheel(
        tmp_path,
        "lacking-1.0-py3-none-any.whl",
        "Requires-Dist: absent\nRequires-Dist: other<2\nRequires-Dist: torch>=2.12",
    )
    assert wheels.faults(tmp_path) == [
        "lacking-1.0-py3-none-any.whl requires absent, which is neither in the folder nor on the machine.",
        "lacking-1.0-py3-none-any.whl requires other<2, and the folder has other 2.1.",
        "lacking-1.0-py3-none-any.whl requires torch>=2.12, and the machine has torch 2.11.0.",
        "old-1.0-cp311-cp311-manylinux_2_28_x86_64.whl is not for Python 3.12 on x86-64 Linux.",
        "old-1.0-cp311-cp311-manylinux_2_28_x86_64.whl requires Python <3.12.",
    ]


class Configuration(NamedTuple):
    tile: int
    warps: int


def test_tuning_climbs_past_what_is_wrong():
    """Best at (64, 16); larger tiles are not to be had, and single warps give wrong results."""
    table = LookedUp({"sm_90": Configuration(16, 2), "gfx942": Configuration(16, 2)})

    def cost() -> float:
        tile, warps = table["sm_90"]
        return float("inf") if tile > 64 or warps == 1 else 64 / tile * abs(math.log2(warps / 16)) / 12

    costs = dict(climb(table, "sm_90", cost, most_trials=50))
    assert table["sm_90"] == Configuration(64, 16)
    assert costs[table["sm_90"]] == min(costs.values()) == 0
    assert table.keys_seen == ["sm_90"]
    assert len(costs) < 50
    assert list(climb(table, "gfx942", cost, most_trials=0)) == [(Configuration(16, 2), 1.0)]
    nan = torch.tensor([float("nan")])
    assert not agrees([nan], [torch.ones(1)], limit=1.0)
    assert not agrees([torch.tensor([1.1])], [torch.ones(1)], limit=0.05)
    assert agrees([torch.tensor([1.01])], [torch.ones(1)], limit=0.05)


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_gpu_script_resumes_after_an_interruption(tmp_path):
    """With a GPU that only has a name, and a Python that leaves what it was asked for as the figures, or fails once."""
    root, programs = tmp_path / "root", tmp_path / "programs"
    for folder in (root / "benchmarks", root / "tests" / "kernels", programs):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", root / "benchmarks")
    (root / "tests" / "kernels" / "test_scan.py").touch()
    executable(programs / "nvidia-smi", "#!/bin/sh\necho Imaginary H100\n")
    executable(
        programs / "python",
        f"""#!{sys.executable}
import pathlib, sys
if "KDA" in sys.argv and not pathlib.Path("second").exists():
    pathlib.Path("second").touch()
    sys.exit(1)
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text(" ".join(sys.argv[1:]))
""",
    )

    def script(*pieces: str) -> subprocess.CompletedProcess[str]:
        return run(
            "bash", str(root / "benchmarks/gpu.sh"), *pieces, PATH=f"{programs}:{os.environ['PATH']}", PYTHON="python"
        )

    results = root / "benchmarks/results/imaginary_h100"
    first = script()
    assert first.returncode == 1
    assert "failed: compiled_KDA" in first.stdout
    names = script("--list").stdout.split()
    assert {path.stem for path in results.glob("*.json")} == set(names) - {"compiled_KDA"}
    assert "test_scan.py" in (results / "test_scan.json").read_text()
    assert "--most 0 --widths 128" in (results / "configurations_128.json").read_text()

    (results / "kernels_anchor.json").write_text("kept")
    second = script()
    assert second.returncode == 0
    assert second.stdout.count("already done") == len(names) - 1
    assert (results / "compiled_KDA.json").exists()
    assert (results / "kernels_anchor.json").read_text() == "kept"
    assert script("no_such_piece").returncode == 2


def test_gpu_script_says_that_there_is_no_gpu(tmp_path):
    executable(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    result = run("bash", "benchmarks/gpu.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 2
    assert "No GPU" in result.stderr
