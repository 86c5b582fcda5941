"""Kernels compile for GPUs that are not there, fit in their memory and keep to their registers.

Every configuration at every width is in kernels/RESOURCES.md, which is checked against its limits and against the code
that it was made of. Some instances are compiled here; `make test-long` compiles the most demanding of them.
"""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "kernels").glob("*.py"))
KERNELS = {
    f"{path.stem}.{name}"
    for path in FILES
    for name in re.findall(r"^def _?(\w+)_kernel\(", path.read_text(), re.MULTILINE)
}
AGAIN = "; kernels have changed since it was written: run python -m benchmarks.kernel_resources --table"


@pytest.fixture
def resources():
    """The program. Its import removes TRITON_INTERPRET from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
        from benchmarks import kernel_resources
    return kernel_resources


@pytest.fixture
def table(resources) -> str:
    return resources.TABLE.read_text()


def test_table_is_of_these_files(table, resources):
    for path in FILES:
        assert f"- {path.name}: {resources.fingerprint(path)}" in table, path.name + AGAIN


def test_table_is_whole_and_within_limits(table, resources):
    """Every kernel, and every instance of it at every width and in every dtype, on every target."""
    header, cells = None, {}
    for line in table.splitlines():
        fields = [field.strip() for field in line.strip("|").split("|")]
        if line.startswith("| kernel"):
            header = fields
        elif line.startswith("| ") and header:
            cells[tuple(fields[:4])] = dict(zip(header[4:], fields[4:], strict=True))
    assert {key[0] for key in cells} == KERNELS
    assert {key[1:] for key in cells} == set(product(resources.CALLS, resources.DTYPES, map(str, resources.WIDTHS)))
    launched = set()
    for (kernel, instance, dtype, width), targets in cells.items():
        for target, cell in targets.items():
            if cell == "-":
                continue
            launched.add((target, instance, dtype, width))
            used = dict(zip(resources.COLUMNS, [*map(int, cell.split(" / ")), 0], strict=False))
            case = dict(kernel=kernel, instance=instance, dtype=dtype, width=int(width), target=target)
            assert resources.excesses(case | used) == []
    assert launched == set(product(resources.TARGETS, resources.CALLS, resources.DTYPES, map(str, resources.WIDTHS)))


def test_excesses_are_named(resources):
    row = dict(kernel="file.scan", instance="KDA", dtype="bfloat16", width=64, target="gfx942")
    row |= {"registers": 512, "spills": 33, "shared KiB": 65.0, "tensor columns": 513}
    spills, shared, tensor = resources.excesses(row)
    assert spills == "file.scan of KDA, width 64, bfloat16, on gfx942 spills 33 registers; the limit is 32"
    assert "65.0 KiB of shared memory; the limit is 64" in shared
    assert "513 columns of tensor memory; the limit is 512" in tensor


def test_fingerprint_is_of_the_code(tmp_path, resources):
    def of(text):
        (tmp_path / "x.py").write_text(text)
        return resources.fingerprint(tmp_path / "x.py")

    known = of('"""What."""\nif a:\n    b = "c"\nd\n')
    assert of('"""Else."""\n# a comment\nif a:  # another\n    b  =  "c"\n\nd\n') == known
    assert of('if a:\n    b = "c"\n    d\n') != known
    assert of('if a:\n    b = "d"\nd\n') != known


def test_only_what_changed_is_compiled_again(table, resources):
    """Instances that have a kernel in a changed file; with another Triton, or after faults, all."""
    cells = resources.cells_of(table)
    assert resources.to_keep(table) == cells
    known = resources.fingerprint(resources.KERNELS / "elementwise_recurrence.py")
    kept = resources.to_keep(table.replace(known, "another"))
    assert set(cells) - set(kept) == {key for key in cells if key[1] in ("Mamba", "S4")}
    known = resources.fingerprint(resources.KERNELS / "linear_recurrence.py")
    kept = {key[1] for key in resources.to_keep(table.replace(known, "another"))}
    assert kept == set(resources.CALLS) - set(resources.RECURRENCES)
    known = resources.fingerprint(resources.KERNELS / "recurrence_tiles.py")  # which other files import
    kept = {key[1] for key in resources.to_keep(table.replace(known, "another"))}
    assert kept == set(resources.CALLS) - set(resources.RECURRENCES)
    assert resources.to_keep(table.replace("with Triton ", "with Triton 0")) == {}
    assert resources.to_keep(table.replace("\nNothing.\n", "\n- a fault\n")) == {}


def assert_compile(tmp_path, targets, instances):
    """Compiles instances at width 128 in a separate process, since here kernels may be interpreted; their kernels."""
    output = tmp_path / "resources.json"
    command = ["--targets", *targets, *"--widths 128 --dtypes bfloat16 --processes 1".split()]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_resources", *command, "--instances", *instances, "--output", output],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return {(row["kernel"], row["target"]) for row in json.loads(output.read_text())["rows"]}


FUSED = ["short convolution", "gated RMS norm", "decay gate", "dispatch and combine", "weighted SwiGLU"]


def test_a_recurrence_and_fused_operations_compile(tmp_path):
    compiled = assert_compile(tmp_path, ["sm_90"], ["Mamba2", *FUSED])
    assert {kernel.split(".")[0] for kernel, _ in compiled} >= {"linear_recurrence", "causal_conv", "moe_permute"}


@pytest.mark.long
def test_every_kernel_compiles(tmp_path):
    """For one target of each vendor."""
    targets = ["sm_90", "gfx942"]
    assert assert_compile(tmp_path, targets, ["RWKV7", "Mamba2", "Mamba", *FUSED]) == set(product(KERNELS, targets))
