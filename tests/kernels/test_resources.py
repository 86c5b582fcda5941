"""Kernels compile for GPUs that are not there, fit in their shared memory and keep to their registers.

The most demanding instance and the fused operations, for one target of each vendor; all of them are compiled by
`python -m benchmarks.kernel_resources`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_representative_kernels(tmp_path):
    """In a process of its own, since here kernels may be interpreted."""
    output = tmp_path / "resources.json"
    command = "--targets sm_90 gfx942 --widths 128 --dtypes bfloat16 --processes 1".split()
    instances = ["KDA", "Mamba2", "Mamba", "short convolution", "gated RMS norm", "decay gate", "to experts and back"]
    instances.append("weighted SwiGLU")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_resources", *command, "--instances", *instances, "--output", output],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    compiled = {(row["kernel"], row["target"]) for row in json.loads(output.read_text())["rows"]}
    assert compiled == {(kernel, target) for kernel in kernels() for target in ("sm_90", "gfx942")}


def test_table_has_every_kernel():
    text = (ROOT / "kernels" / "RESOURCES.md").read_text()
    missing = {kernel for kernel in kernels() if f"| {kernel} |" not in text}
    assert not missing, "run its first line"


def kernels() -> set[str]:
    """<file>.<kernel> of all that are launched."""
    return {
        f"{path.stem}.{name}"
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def _?(\w+)_kernel\(", path.read_text(), re.MULTILINE)
    }
