"""Speed of the kernels: python -m benchmarks.kernels [--case NAME] [--output FILE]

Every operation runs forward, and forward and backward, on new random data each time. The contestants are the kernels of
torchlmoe; plain PyTorch (for a recurrence, the chunked form) and the same compiled; flash-linear-attention, if it is
installed; and FlashAttention through SDPA. Times are medians, of CUDA events on a GPU and of the wall clock on a CPU,
where sizes are tiny and only the program is tested.

TFLOP/s count the operations of the recurrence's definition, token by token (a chunked form needs more). TB/s count
every argument and result once, which every form must read and write. The title has the rates of a matrix product and of
a copy, measured in the same run. "error" is that of the output relative to plain PyTorch in float32,
||x - x'|| / ||x'||. Failures are listed below the table.

The decode case is one token from a state of at least 512 MiB; "x copy" is its time over that of copying the state.
"""

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.operations import OPERATIONS, OURS, PLAIN, Operation, Size, Way, as_leaf, widened
from benchmarks.report import arguments, attempt, matmul_rate, seconds_of, show

CASES = {
    "anchor": Size(batch=1, length=8192, heads=96, key_dim=128, value_dim=128, key_heads=96),
    "shared_heads": Size(batch=1, length=32768, heads=64, key_dim=128, value_dim=128, key_heads=16),
    "long": Size(batch=1, length=131072, heads=8, key_dim=128, value_dim=128, key_heads=8),
    "narrow": Size(batch=8, length=4096, heads=32, key_dim=64, value_dim=64, key_heads=32),
    "wide": Size(batch=4, length=4096, heads=8, key_dim=256, value_dim=256, key_heads=8),
    "short_rows": Size(batch=8, length=1024, heads=96, key_dim=128, value_dim=128, key_heads=96),
    "decode": Size(batch=256, length=1, heads=32, key_dim=128, value_dim=128, key_heads=32),  # 512 MiB of float32
}
TINY = Size(batch=1, length=128, heads=2, key_dim=16, value_dim=16, key_heads=2)
WAYS = sorted({way for operation in OPERATIONS.values() for way in operation.ways})
SHARES_HEADS = {"Gated DeltaNet", "KDA"}  # operations of models that share query and key heads
Inputs = dict[str, Tensor]


def warmups(device: str) -> int:
    """Return the number of runs that are not counted: none on a CPU, where nothing is measured."""
    return 0 if device == "cpu" else 2


def forward_seconds(way: Way, make: Callable[[], Inputs], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats + warmups(device)):
        given = way.arguments(make())
        with torch.no_grad():
            times.append(seconds_of(lambda given=given: way.run(**given), device))
    return statistics.median(times[warmups(device) :])


def both_seconds(way: Way, make: Callable[[], Inputs], repeats: int, device: str) -> float:
    """Return the seconds of forward and backward, with the gradients of all arguments."""
    with torch.no_grad():
        output = way.run(**way.arguments(make()))
    times = []
    for _ in range(repeats + warmups(device)):
        given = {name: as_leaf(tensor) for name, tensor in way.arguments(make()).items()}
        grad = torch.randn(output.shape, device=device).to(output.dtype)
        times.append(seconds_of(lambda given=given, grad=grad: way.run(**given).backward(grad), device))
    return statistics.median(times[warmups(device) :])


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copy_rate(device: str, repeats: int = 7) -> float:
    """Return the bytes per second that a copy of 1 GiB (64 MiB on a CPU) reads and writes."""
    size = (1 << 30) if device != "cpu" else (1 << 26)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(repeats + warmups(device))]
    return 2 * size / statistics.median(times[warmups(device) :])


def error(way: Way, operation: Operation, inputs: Inputs) -> float | None:
    reference = operation.ways.get(PLAIN)
    if reference is None:
        return None
    with torch.no_grad():
        expected = reference.run(**reference.arguments(widened(inputs)))
        return ((way.run(**way.arguments(inputs)) - expected).norm() / expected.norm()).item()


def rows_of(
    name: str,
    ways: dict[str, Way],
    size: Size,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    failures: list[str],
) -> list[dict[str, Any]]:
    operation = OPERATIONS[name]

    def make() -> Inputs:
        return operation.make(size, dtype, device)

    rows = []
    for way_name, way in ways.items():
        notes: list[str] = []
        inputs = make()
        read, written = num_bytes(way.arguments(inputs).values()), num_bytes([inputs["v" if "v" in inputs else "x"]])
        forward = attempt(notes, forward_seconds, way, make, repeats, device)
        both = attempt(notes, both_seconds, way, make, repeats, device)
        flops = operation.flops(size)
        rows.append(
            {
                "operation": name,
                "by": way_name,
                "fwd ms": forward and forward * 1e3,
                "TFLOP/s": forward and flops / forward / 1e12,
                "TB/s": forward and (read + written) / forward / 1e12,
                "fwd+bwd ms": both and both * 1e3,
                "TFLOP/s both": both and 3 * flops / both / 1e12,
                # The backward reads the arguments again and the gradient of the output, and writes all gradients.
                "TB/s both": both and (3 * read + 2 * written) / both / 1e12,
                "error": attempt(notes, error, way, operation, inputs),
            }
        )
        failures += [f"{name}, {way_name}: {note}" for note in notes]
    return with_ratios(rows, "fwd+bwd ms")


def decode_rows(
    name: str, ways: dict[str, Way], size: Size, dtype: torch.dtype, device: str, repeats: int, failures: list[str]
) -> list[dict[str, Any]]:
    state_shape = OPERATIONS[name].state_shape(size)

    def make() -> Inputs:
        state = torch.randn(state_shape, device=device)
        return OPERATIONS[name].make(size, dtype, device) | {"initial_state": state}

    state = make()["initial_state"]
    copies = [seconds_of(state.clone, device) for _ in range(repeats + warmups(device))]
    copy = statistics.median(copies[warmups(device) :])
    rows = []
    for way_name, way in ways.items():
        notes: list[str] = []
        seconds = attempt(notes, forward_seconds, way, make, repeats, device)
        rows.append(
            {
                "operation": name,
                "by": way_name,
                "step ms": seconds and seconds * 1e3,
                "TB/s of state": seconds and 2 * num_bytes([state]) / seconds / 1e12,
                "x copy": seconds and seconds / copy,
            }
        )
        failures += [f"{name}, {way_name}: {note}" for note in notes]
    return with_ratios(rows, "step ms")


def with_ratios(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """Add the column "x ours": the time divided by that of torchlmoe."""
    ours = next((row[column] for row in rows if row["by"] == OURS), None)
    for row in rows:
        row["x ours"] = row[column] / ours if ours and row[column] else None
    return rows


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="anchor", help="which sizes; tiny ones on a CPU")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, help="which; all that the case fits if unset")
    parser.add_argument("--by", nargs="+", choices=WAYS, help="whose code; everyone's if unset")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, size = getattr(torch, options.dtype), CASES[options.case]
    decodes, has_fla = size.length == 1, importlib.util.find_spec("fla") is not None
    if device == "cpu":
        size = Size(**{**vars(TINY), "length": 1}) if decodes else TINY
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for name in options.operations or OPERATIONS:
        if size.key_heads != size.heads and name not in SHARES_HEADS:
            continue
        operation = OPERATIONS[name]
        ways = operation.decode_ways if decodes else operation.ways
        ways = {by: way for by, way in ways.items() if by in (options.by or WAYS) and (by != "fla" or has_fla)}
        measure = decode_rows if decodes else rows_of
        rows += measure(name, ways, size, dtype, device, options.repeats, failures)
    ceilings = {
        "matmul TFLOP/s": matmul_rate(dtype, device, 8192 if device == "cuda" else 512) / 1e12,
        "copy TB/s": copy_rate(device) / 1e12,
    }
    clock = "CUDA events" if device == "cuda" else "wall clock of a CPU: a test of the program, not a measurement"
    reached = ", ".join(f"{name} {value:.3g}" for name, value in ceilings.items())
    title = f"{options.case}: {size}, {options.dtype}, median of {options.repeats} by {clock}; ceilings: {reached}"
    facts = {"case": options.case, "size": vars(size), "clock": clock, "ceilings": ceilings, "failures": failures}
    show(title, rows, options.output, **facts)
    print("\n".join(["", *failures] if has_fla else ["", *failures, "fla is not installed"]))


if __name__ == "__main__":
    main()
