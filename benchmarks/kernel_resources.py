"""Registers, spills, shared and tensor memory of every kernel, without a GPU: python -m benchmarks.kernel_resources

Every operation runs forward and backward on small CPU tensors, but a launch only compiles the kernel: for sm_80, sm_90,
sm_100 and gfx942, with the configurations for them in the kernel's file, at key and value widths of 64, 128 and 256 in
bfloat16 and float32. The program ends with exit code 1 and a list if a kernel does not compile, does not fit the memory
of the target, or spills more than MOST_SPILLS registers.

Spills are the registers of a thread that are kept in memory: for CUDA, the stack frame in words that cuobjdump reports,
and for ROCm the number in the notes of the code object. Shared memory, and on sm_100 columns of tensor memory, are
those that a program requests. The table has a fingerprint of each file, so that a test can tell whether it is outdated.
"""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton and the kernels' files are imported

import torch
import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.fingerprints import fingerprint, parts_of
from benchmarks.operations import OPERATIONS, Size, kernel_modules
from benchmarks.report import arguments, show

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # limit of one program
TENSOR_COLUMNS = 512  # limit of tensor memory for one program on sm_100
MOST_SPILLS = 32  # a CUDA thread has at most 255 registers
MOST_SPILLS_WIDE = 400  # in float32 beyond 128 channels: without tensor cores, hundreds of products follow each load
WIDTHS = (64, 128, 256)
DTYPES = ("bfloat16", "float32")
# Decoding of a row and of packed documents, one chunk, documents of several spans: they may launch different kernels.
LENGTHS = (1, 2, 64, 320)
HEADS = 16
KERNELS = Path(__file__).parents[1] / "kernels"
TABLE = KERNELS / "RESOURCES.md"
Call = Callable[[int, torch.dtype, int], Any]  # (width, dtype, length) -> outputs


class CompileOnly:
    """Replaces the driver of a GPU. Triton uses no other methods before a launch."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:  # the key of Triton's cache of compiled kernels
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """A kernel with its compiled form, or the reason why it does not compile."""

    kernel: str
    compiled: CompiledKernel | None
    failure: str


@contextmanager
def compiling_for(target: str) -> Iterator[list[Launch]]:
    """Makes launches compile for `target` instead of running. Each launch is added to the list."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel | None:
        compiled, failure = None, ""
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # of the compiler: it becomes a line of the table
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        file, name = self.__module__.rpartition(".")[2], self.__name__.strip("_").removesuffix("_kernel")
        launches.append(Launch(f"{file}.{name}", compiled, failure))
        return compiled

    chosen = {module: module.architecture for module in kernel_modules() if hasattr(module, "architecture")}
    JITFunction.run = compile_only
    triton.runtime.driver.set_active(CompileOnly(TARGETS[target]))
    for module in chosen:
        module.architecture = lambda x: target
    try:
        yield launches
    finally:
        JITFunction.run = run
        for module, architecture in chosen.items():
            module.architecture = architecture


def resources(compiled: CompiledKernel) -> dict[str, float]:
    """Return registers and spills of a thread, and warps, shared memory and columns of tensor memory of a program."""
    if compiled.metadata.target.backend == "hip":
        notes = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\n", compiled.asm["amdgcn"])}
        registers, spills = notes["vgpr_count"], notes["vgpr_spill_count"]
    else:
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        registers, spills = int(found[1]), int(found[2]) // 4
    return {
        "warps": compiled.metadata.num_warps,
        "registers": registers,
        "spills": spills,
        "shared KiB": compiled.metadata.shared / 1024,
        "tensor columns": getattr(compiled.metadata, "tmem_size", None) or 0,
    }


def kernels(file: str) -> Any:
    return importlib.import_module(f"torchlmoe.kernels.{file}")


def leaf(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.requires_grad_()


def inputs_of(name: str, width: int, dtype: torch.dtype, length: int, *order: str) -> list[torch.Tensor | None]:
    """Return the named inputs of an operation, with None for those that it lacks."""
    size = Size(batch=1, length=length, heads=HEADS, key_dim=width, value_dim=width, key_heads=HEADS)
    inputs = OPERATIONS[name].make(size, dtype, "cpu")
    return [leaf(inputs.get(name)) for name in order]


def run_recurrence(name: str) -> Call:
    """Return the call of an instance of the linear recurrence."""
    terms = ("q", "k", "v", "log_decay", "erase", "erase_key", "value_log_decay", "bonus")

    def run(width: int, dtype: torch.dtype, length: int) -> Any:
        bounds = torch.tensor([0, max(1, length // 3), length], dtype=torch.int32) if length in LENGTHS[1::2] else None
        state = torch.zeros(1 if bounds is None else 2, HEADS, width, width, requires_grad=True)
        operation = kernels("linear_recurrence").linear_recurrence
        return operation(*inputs_of(name, width, dtype, length, *terms), 1.0, state, bounds)

    return run


def run_elementwise(width: int, dtype: torch.dtype, length: int) -> Any:
    """Call the recurrence of Mamba with HEADS * width channels."""
    inputs = inputs_of("Mamba", width, dtype, length, "q", "k", "v", "log_decay", "step")
    state = torch.zeros(1, 1, inputs[1].shape[-1], HEADS * width, requires_grad=True)
    return kernels("elementwise_recurrence").elementwise_recurrence(*inputs, state, None)


def run_complex(width: int, dtype: torch.dtype, length: int) -> Any:
    """Call the recurrence of S4: a head per channel, with complex q, k and decay that are constant over tokens."""
    q, k = (torch.randn(HEADS * width, 64, dtype=torch.complex64, requires_grad=True) for _ in range(2))
    rates = torch.complex(-torch.rand(len(k), 64, 1), torch.randn(len(k), 64, 1)).requires_grad_()
    v = torch.randn(1, length, len(k), 1).to(dtype).requires_grad_()
    state = torch.zeros(1, *rates.shape, dtype=torch.complex64, requires_grad=True)
    return kernels("elementwise_recurrence").elementwise_recurrence(q, k, v, rates, None, state, None)


def run_convolution(width: int, dtype: torch.dtype, length: int) -> Any:
    """Call the convolution on packed documents."""
    inputs = inputs_of("short convolution", width, dtype, length, "x", "weight", "bias")
    bounds = torch.tensor([0, length // 2, length], dtype=torch.int32)
    return [kernels("causal_conv").causal_conv(*inputs, None, bounds, True)]


def run_norm(width: int, dtype: torch.dtype, length: int) -> Any:
    inputs = inputs_of("gated RMS norm", width, dtype, length, "x", "weight", "gate")
    return [kernels("gated_rms_norm").gated_rms_norm(*inputs, 1 / width, 1e-6, "silu")]


def run_gate(width: int, dtype: torch.dtype, length: int) -> Any:
    """Call the decay gate with each of its activations."""
    inputs = inputs_of("decay gate", width, dtype, length, "x", "bias", "A_log")
    gates = kernels("gates")
    return [y for activation in gates.ACTIVATIONS for y in gates.decay_gate(*inputs, activation, 1.0, [], True)]


def run_dispatch(width: int, dtype: torch.dtype, length: int) -> Any:
    """Call dispatch and combine with 8 slots per token and routing weights."""
    slot, x = torch.randperm(8 * length).view(length, 8), torch.randn(length, HEADS * width).to(dtype)
    moved = kernels("moe_permute").permute(leaf(x), slot.flatten().argsort() // 8, slot)
    return [kernels("moe_permute").unpermute(moved, slot.flatten().argsort() // 8, slot, leaf(torch.rand(length, 8)))]


def run_swiglu(width: int, dtype: torch.dtype, length: int) -> Any:
    """Call the activation on gate and up of HEADS * width channels, concatenated, and a routing weight per row."""
    hidden = torch.randn(length, 2 * HEADS * width).to(dtype)
    return [kernels("weighted_swiglu").weighted_swiglu(leaf(hidden), leaf(torch.rand(length)))]


RECURRENCES = (
    "linear attention", "Mamba2", "GLA", "RWKV6", "value decay", "gated fast weights",
    "DeltaNet", "Gated DeltaNet", "KDA", "RWKV7",
)  # fmt: skip
CALLS: dict[str, Call] = {
    **{name: run_recurrence(name) for name in RECURRENCES},
    "Mamba": run_elementwise,
    "S4": run_complex,
    "short convolution": run_convolution,
    "gated RMS norm": run_norm,
    "decay gate": run_gate,
    "dispatch and combine": run_dispatch,
    "weighted SwiGLU": run_swiglu,
}


def rows_for(target: str, call: str, width: int, dtype: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each kernel that is launched, with the largest numbers over its launches.

    The second result has a sentence for each kernel that does not compile.
    """
    with compiling_for(target) as launches:
        for length in LENGTHS:
            outputs = [x for x in CALLS[call](width, getattr(torch, dtype), length) if x.requires_grad]
            if length > 1:
                torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    rows: dict[str, dict[str, Any]] = {}
    failures = []
    for launch in launches:
        case = {"kernel": launch.kernel, "instance": call, "dtype": dtype, "width": width, "target": target}
        if launch.compiled is None:
            failures.append(f"{described(case)} does not compile: {launch.failure}")
            continue
        used = resources(launch.compiled)
        row = rows.setdefault(launch.kernel, case | dict.fromkeys(used, 0))
        row |= {name: max(row[name], value) for name, value in used.items()}
    return list(rows.values()), failures


def described(row: dict[str, Any]) -> str:
    return f"{row['kernel']} of {row['instance']}, width {row['width']}, {row['dtype']}, on {row['target']}"


def excesses(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each limit that a row exceeds."""
    wide = row["dtype"] == "float32" and row["width"] > 128
    limits = {
        "spills": (MOST_SPILLS_WIDE if wide else MOST_SPILLS, "spills {} registers; the limit is {}"),
        "shared KiB": (SHARED_KIB[row["target"]], "needs {} KiB of shared memory; the limit is {}"),
        "tensor columns": (TENSOR_COLUMNS, "needs {} columns of tensor memory; the limit is {}"),
    }
    return [
        f"{described(row)} {text.format(row[name], limit)}"
        for name, (limit, text) in limits.items()
        if row[name] > limit
    ]


Cells = dict[tuple[str, ...], dict[str, str]]  # by kernel, instance, dtype and width; by target


def cells_of(table: str) -> Cells:
    """The cells of a written table, but for those that are empty."""
    header, cells = [], {}
    for line in table.splitlines():
        fields = [field.strip() for field in line.strip("|").split("|")]
        if line.startswith("| kernel"):
            header = fields[4:]
        elif line.startswith("| ") and header:
            named = zip(header, fields[4:], strict=True)
            cells[tuple(fields[:4])] = {target: cell for target, cell in named if cell != "-"}
    return cells


def to_keep(table: str) -> Cells:
    """The cells of those instances all of whose kernels are, in their files, as they were when the table was written;
    none if it was written with another Triton, or has faults."""
    if f"Triton {triton.__version__} " not in table or "\nNothing.\n" not in table:
        return {}
    cells = cells_of(table)
    changed = {path for path in KERNELS.glob("*.py") if f"- {path.name}: {fingerprint(path)}" not in table}
    files = {file: parts_of(KERNELS / f"{file}.py") for file in {key[0].split(".")[0] for key in cells}}
    again = {key[1] for key in cells if files[key[0].split(".")[0]] & changed}
    return {key: cell for key, cell in cells.items() if key[1] not in again}


COLUMNS = ("registers", "spills", "shared KiB", "tensor columns")


def write_table(rows: list[dict[str, Any]], faults: list[str], kept: Cells, path: Path) -> None:
    """Write a line for each kernel, instance, dtype and width with a column for each target, and then the faults.

    kept: cells of instances that were not compiled again.
    """
    cells = dict(kept)
    for row in rows:
        line = cells.setdefault(tuple(str(row[name]) for name in ("kernel", "instance", "dtype", "width")), {})
        used = COLUMNS if row["target"] == "sm_100" else COLUMNS[:-1]
        line[row["target"]] = " / ".join(f"{row[name]:.0f}" for name in used)
    calls = list(CALLS)
    order = sorted(cells, key=lambda key: (key[0], calls.index(key[1]), int(key[3]), DTYPES.index(key[2])))
    targets = list(TARGETS)
    lines = [
        "<!-- written by python -m benchmarks.kernel_resources --table: do not edit -->",
        "",
        "# Registers, spilled registers and KiB of shared memory",
        "",
        f"Compiled with Triton {triton.__version__} and without a GPU. For sm_100, the last number is columns of "
        "tensor memory. Each cell has the largest numbers over all launches of the kernel, forward and backward. The "
        "limits of shared memory are " + ", ".join(f"{SHARED_KIB[name]} KiB on {name}" for name in targets) + "; "
        f"that of tensor memory is {TENSOR_COLUMNS} columns. The limit of spilled registers is {MOST_SPILLS}, or "
        f"{MOST_SPILLS_WIDE} in float32 at a width of 256, where products run without tensor cores. A dash means that "
        "the kernel is not launched: another kernel includes its work.",
        "",
        "| kernel | instance | dtype | width | " + " | ".join(targets) + " |",
        "|---|---|---|---|" + "---|" * len(targets),
        *(
            "| " + " | ".join(key) + " | " + " | ".join(cells[key].get(name, "-") for name in targets) + " |"
            for key in order
        ),
        "",
        "## Beyond the limits",
        "",
        *([f"- {fault}" for fault in faults] or ["Nothing."]),
        "",
        "## Fingerprints of the files",
        "",
        *(f"- {path.name}: {fingerprint(path)}" for path in sorted(KERNELS.glob("*.py"))),
    ]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write kernels/RESOURCES.md; compiles what changed")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--instances", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="compilers at a time")
    options = parser.parse_args()
    kept = to_keep(TABLE.read_text()) if options.table and TABLE.exists() else {}
    cases = list(product(options.targets, options.instances, options.widths, options.dtypes))
    if options.table and len(cases) < len(TARGETS) * len(CALLS) * len(WIDTHS) * len(DTYPES):
        parser.error("--table needs all cases: leave out --targets, --instances, --widths and --dtypes.")
    cases = [case for case in cases if case[1] not in {key[1] for key in kept}]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        compiled = pool.map(rows_for, *zip(*cases, strict=True)) if cases else []
        parts = list(track(compiled, "compiling", total=len(cases)))
    rows = sorted((row for part, _ in parts for row in part), key=lambda row: row["kernel"])
    faults = [text for _, failures in parts for text in failures] + [text for row in rows for text in excesses(row)]
    if options.table:
        write_table(rows, faults, kept, TABLE)
    else:
        show("Resources of kernels", rows, options.output, faults=faults)
    print("\n".join(faults))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
