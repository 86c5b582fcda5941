"""The programs that measure kernels run, here on tiny sizes; benchmarks/gpu.sh goes on where it was interrupted."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.tune_kernels import LookedUp, agrees, climb

ROOT = Path(__file__).parents[2]


def run(*command: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """Without a GPU, where sizes are tiny, and outside of the interpreter, where kernels take long."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | changed
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "arguments", "rows"),
    [
        ("kernels", "--operations KDA Mamba --by torchlmoe PyTorch".split(), 4),
        ("kernels", ["--case", "decode", "--operations", "KDA", "--by", "torchlmoe"], 1),
        ("throughput", ["--flavor", "debug", "--instances", "gla", "--lengths", "32", "64", "--tokens", "64"], 2),
    ],
)
def test_measures(tmp_path, module, arguments, rows):
    output = tmp_path / "figures.json"
    result = run(sys.executable, "-m", f"benchmarks.{module}", *arguments, "--repeats", "1", "--output", str(output))
    assert result.returncode == 0, result.stderr
    record = json.loads(output.read_text())
    assert len(record["rows"]) == rows
    assert not record["failures"]
    assert {"torch", "triton", "ptxas", "driver", "gpu"} <= record["machine"].keys()
    for row in record["rows"]:
        assert row.get("error", 0) < 1e-2
        assert None not in row.values()


class Configuration(NamedTuple):
    tile: int
    warps: int


def test_tuning_climbs_past_what_is_wrong():
    """Best at (64, 16); larger tiles are not to be had, and single warps give wrong results."""
    table = LookedUp({"sm_90": Configuration(16, 2), "gfx942": Configuration(16, 2)})

    def cost() -> float:
        tile, warps = table["sm_90"]
        return float("inf") if tile > 64 or warps == 1 else 64 / tile * abs(math.log2(warps / 16)) / 12

    best, best_cost, num_tried = climb(table, "sm_90", cost, most_trials=50)
    assert (best, table["sm_90"]) == (Configuration(64, 16), best)
    assert best_cost == 0
    assert table.keys_seen == ["sm_90"]
    assert num_tried < 50
    assert climb(table, "gfx942", cost, most_trials=0) == (Configuration(16, 2), 1.0, 1)
    nan = torch.tensor([float("nan")])
    assert not agrees([nan], [torch.ones(1)], limit=1.0)
    assert not agrees([torch.tensor([1.1])], [torch.ones(1)], limit=0.05)
    assert agrees([torch.tensor([1.01])], [torch.ones(1)], limit=0.05)


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_gpu_script_goes_on_where_it_was_interrupted(tmp_path):
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
    assert second.stdout.count("done before") == len(names) - 1
    assert (results / "compiled_KDA.json").exists()
    assert (results / "kernels_anchor.json").read_text() == "kept"
    assert script("no_such_piece").returncode == 2


def test_gpu_script_says_that_there_is_no_gpu(tmp_path):
    executable(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    result = run("bash", "benchmarks/gpu.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 2
    assert "No GPU" in result.stderr
