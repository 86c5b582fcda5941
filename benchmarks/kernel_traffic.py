"""Bytes that kernels move, beside those that must move: python -m benchmarks.kernel_traffic

Writes kernels/TRAFFIC.md and benchmarks/results/kernel_traffic.json. Every mixer runs on tensors without memory, as a
layer of the paper's A0.3B model (width 1024, 8 heads), and so do the recurrences of published timings. What they call
is recorded, and what its launches move on a Hopper GPU is counted by `benchmarks.launch_traffic`. No GPU is needed, and
no figure but the published times and the GPUs' rates is typed in.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.fingerprints import fingerprint
from benchmarks.launch_traffic import Kernels, Traffic, machine, size_in_memory, traffic_of
from benchmarks.operations import OPERATIONS, OURS, Size
from benchmarks.report import arguments
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS
from torchlmoe.ops.weighted_swiglu import weighted_swiglu
from torchlmoe.routing.dispatch import Slots, gather_slots, sum_slots

KERNELS = Path(__file__).parents[1] / "kernels"
PAGE = KERNELS / "TRAFFIC.md"
RECORD = Path(__file__).parent / "results" / "kernel_traffic.json"
ARCHITECTURE = "sm_90"
HALF = torch.float16  # of the size of bfloat16, which the interpreter computes wrongly
MOST = 1.5  # bytes moved over bytes needed that call for a reason
KEPT = "starts"  # what the elementwise recurrence keeps for its backward: no input and no result of the mathematics
PARTS = ("read", "written", "once")
FORWARD, BACKWARD, BOTH = "forward", "backward", "both"


@dataclass(frozen=True)
class Gpu:
    """Bytes and FLOPs a second, both as measured if `measured` says so."""

    name: str
    bytes: float
    flops: float
    source: str


GPUS = (
    Gpu("H100", 2.7e12, 989e12, "a copy as measured (2.6 to 2.8 of 3.35 TB/s); products at their peak"),
    Gpu("H200", 4.3e12, 783e12, "both as measured (769 to 798 TFLOP/s)"),
)


@dataclass(frozen=True)
class Published:
    """Milliseconds that authors gave for their own kernels, read in autumn 2026."""

    case: str
    direction: str
    gpu: str
    times: str


PUBLISHED = (
    Published("gated delta B1 T8192 H16/64 D128", FORWARD, "H200", "fla 0.814, FlashQLA 0.397"),
    Published("gated delta B1 T32768 H16/64 D128", FORWARD, "H200", "fla 3.331, FlashQLA 1.521"),
    Published("gated delta B1 T8192 H16/32 D128", BACKWARD, "H200", "fla 1.444, FlashQLA 0.789"),
    Published("gated delta B1 T32768 H16/32 D128", BACKWARD, "H200", "fla 5.697, FlashQLA 2.515"),
    Published("KDA B1 T8192 H64 D128", FORWARD, "H200", "fla 1.819, cuLA 1.758"),
    Published("KDA B1 T4096 H16 D128", FORWARD, "H100", "attention-gym 0.349"),
    Published("KDA B1 T4096 H16 D128", BACKWARD, "H100", "attention-gym 1.293"),
    Published("KDA B1 T4096 H16 D128", BOTH, "H100", "attention-gym 2.725"),
    Published("linear attention B1 T8192 H96 D128", FORWARD, "H100", "fla 0.726, Helion 0.682"),
    Published("linear attention B1 T8192 H96 D128", BOTH, "H100", "fla 3.37, Helion 2.01"),
    Published("retention B1 T8192 H96 D128", FORWARD, "H100", "fla 0.961, Helion 0.691"),
    Published("retention B1 T8192 H96 D128", BOTH, "H100", "fla 3.43, Helion 2.06"),
)
TIMED = {
    "gated delta": ("Gated DeltaNet", [(8192, 16, 64), (32768, 16, 64), (8192, 16, 32), (32768, 16, 32)]),
    "KDA": ("KDA", [(8192, 64, 64), (4096, 16, 16)]),
    "linear attention": ("linear attention", [(8192, 96, 96)]),
    "retention": ("retention", [(8192, 96, 96)]),
    "GLA": ("GLA", [(8192, 96, 96)]),
}
RECURRENCES = ("linear_recurrence", "elementwise_recurrence")
LAYERS = {"2K x 8": (8, 2048), "16K x 1": (1, 16384)}  # rows and tokens of a row
DIM, HEADS, FFN_DIM, EXPERTS, ACTIVE = 1024, 8, 896, 64, 8


@dataclass(frozen=True)
class Call:
    """One operation that a program called, and the operation's results."""

    name: str
    args: tuple
    results: tuple

    @property
    def key(self) -> str:
        """Equal for calls that move the same."""
        return repr((self.name, [_described(x) for x in self.args]))

    @property
    def is_backward(self) -> bool:
        return self.name.endswith("_backward")

    @property
    def operation(self) -> str:
        return self.name.removeprefix("torchlmoe::").removesuffix("_backward").removesuffix("_triton")


def _described(x: Any) -> Any:
    return (tuple(x.shape), x.stride(), str(x.dtype)) if isinstance(x, Tensor) else x


class Recorder(TorchDispatchMode):
    """The calls of operations that have kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.startswith("torchlmoe::") and name.removesuffix("_backward").endswith("_triton"):
            self.calls.append(Call(name, args, tuple(tree_leaves(results))))
        return results


def serves(backend: str, *tensors: Tensor | None, refusal: str | None = None) -> bool:
    """In the place of `kernels_serve`: as on a GPU."""
    return refusal is None and all(x is None or x.dtype not in (torch.float64, torch.complex128) for x in tensors)


def recorded(program: Callable[[], Tensor]) -> list[Call]:
    """Run a program and its backward on meta tensors, as if on a GPU."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("torchlmoe.") and hasattr(module, "kernels_serve"):
                stack.enter_context(patch.object(module, "kernels_serve", serves))
        recorder = stack.enter_context(Recorder())
        output = program()
        output.backward(torch.empty_like(output))
    return recorder.calls


def of_mixer(name: str, rows: int, length: int) -> Tensor:
    with torch.device("meta"):
        takes_heads = name not in ("s4", "mamba")
        mixer = MIXERS[name](DIM, **({"num_heads": HEADS} if takes_heads else {})).to(HALF)
        x = torch.empty(rows, length, DIM, dtype=HALF, requires_grad=True)
    return mixer(x, sequence=SequenceLayout.of_rows(rows, length, torch.device("meta")))


def of_experts(rows: int, length: int) -> Tensor:
    """Tokens to their experts and back, with the hidden layer's product between."""
    x = torch.empty(rows * length, DIM, dtype=HALF, device="meta", requires_grad=True)
    expert = torch.empty(len(x), ACTIVE, dtype=torch.int64, device="meta")
    slots = Slots.sorted_by_expert(expert, EXPERTS)
    moved = gather_slots(x, slots)
    hidden = torch.empty(len(moved), 2 * FFN_DIM, dtype=HALF, device="meta", requires_grad=True)
    weight = torch.empty(len(moved), device="meta", requires_grad=True)
    return sum_slots(moved + weighted_swiglu(hidden, weight).sum(), slots)


def of_operation(name: str, size: Size) -> Tensor:
    operation = OPERATIONS[name]
    way = operation.ways[OURS]
    inputs = way.arguments(operation.make(size, HALF, "meta"))
    with patch("benchmarks.operations._kernels", lambda: "triton"):
        return way.run(**{name: x.requires_grad_() for name, x in inputs.items()})


def programs() -> dict[str, dict[str, Callable[[], Tensor]]]:
    """By case and instance."""
    found: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for case, (rows, length) in LAYERS.items():
        # Of mom and attention, see the page.
        mixers = {name: partial(of_mixer, name, rows, length) for name in MIXERS if name not in ("mom", "attention")}
        found[case] = mixers | {"experts": partial(of_experts, rows, length)}
    for label, (name, sizes) in TIMED.items():
        for length, key_heads, heads in sizes:
            size = Size(batch=1, length=length, heads=heads, key_dim=128, value_dim=128, key_heads=key_heads)
            found[f"{label} {size}"] = {label: partial(of_operation, name, size)}
    return found


def bytes_needed(call: Call) -> int:
    """Every input read once and every output written once."""
    schema = getattr(torch.ops.torchlmoe, call.name.removeprefix("torchlmoe::")).default._schema
    names = [x.name for x in schema.arguments]
    read = [x for name, x in zip(names, call.args, strict=True) if isinstance(x, Tensor) and name != KEPT]
    written = call.results[:2] if call.operation == "elementwise_recurrence" and not call.is_backward else call.results
    return sum(size_in_memory(x) for x in (*read, *written) if x.numel())


def flops_needed(call: Call) -> int:
    """Of the definition, token by token; none are counted where the cost is the bytes."""
    formula = flop_registry.get(getattr(torch.ops.torchlmoe, call.name.removeprefix("torchlmoe::")))
    return 0 if formula is None else int(formula(*call.args, out_val=call.results))


def seconds(kernels: Kernels, gpu: Gpu) -> float:
    """One kernel after another, each for the longer of its bytes and its products."""
    return sum(max(x.bytes / gpu.bytes, x.flops / gpu.flops) for x in kernels.values())


def row_of(instance: str, direction: str, calls: list[Call], counted: dict[str, Kernels]) -> dict[str, Any]:
    """The sum over calls of one operation."""
    kernels = {f"{i + 1}.{name}": x for i, call in enumerate(calls) for name, x in counted[call.key].items()}
    total = Traffic()
    for x in kernels.values():
        total.add(x)
    needed, flops = sum(map(bytes_needed, calls)), sum(map(flops_needed, calls))
    return {
        "operation": calls[0].operation,
        "instance": instance,
        "direction": direction,
        "bytes needed": needed,
        "bytes moved": total.bytes,
        "bytes moved once": total.once.total(),
        "ratio": total.bytes / needed,
        "ratio once": total.once.total() / needed,
        "FLOPs needed": flops,
        "FLOPs in products": total.flops,
        "ms": {
            gpu.name: {
                "needed": 1e3 * max(needed / gpu.bytes, flops / gpu.flops),
                "moved": 1e3 * seconds(kernels, gpu),
            }
            for gpu in GPUS
        },
        "kernels": {
            name: {part: dict(getattr(x, part)) for part in PARTS} | {"FLOPs": x.flops} for name, x in kernels.items()
        },
    }


def rows_of(programs: dict[str, Callable[[], Tensor]], counted: dict[str, Kernels]) -> list[dict[str, Any]]:
    """Forward, backward and both of every operation, once for instances that call it alike.

    counted: what calls have been counted to move, by their keys; grows.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    calls_of: dict[tuple[str, ...], list[Call]] = {}
    for instance, program in programs.items():
        by_operation: dict[str, list[Call]] = {}
        for call in recorded(program):
            by_operation.setdefault(call.operation, []).append(call)
        for calls in by_operation.values():
            key = tuple(sorted(call.key for call in calls))
            alike.setdefault(key, []).append(instance)
            calls_of[key] = calls
    rows = []
    for key, instances in alike.items():
        calls = calls_of[key]
        for call in calls:
            if call.key not in counted:
                counted[call.key] = traffic_of(call.name, call.args)
        name = ", ".join(instances)
        parts = {FORWARD: [x for x in calls if not x.is_backward], BACKWARD: [x for x in calls if x.is_backward]}
        parts[BOTH] = calls
        rows += [row_of(name, direction, part, counted) for direction, part in parts.items() if part]
    return sorted(rows, key=lambda row: (row["operation"] not in RECURRENCES, row["operation"]))


def published(case: str, direction: str) -> str:
    found = [f"{x.times} ({x.gpu})" for x in PUBLISHED if (x.case, x.direction) == (case, direction)]
    return "; ".join(found) or "-"


def table(case: str, rows: list[dict[str, Any]]) -> list[str]:
    header = ["operation", "instance", "", "MB needed", "MB moved", "ratio", "MB once", "ratio once", "GFLOP needed"]
    header += ["GFLOP in products", *(f"{gpu.name} ms needed / moved" for gpu in GPUS), "published ms"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * (len(header) - 4) + "---|"]
    for row in rows:
        megabytes = {name: f"{row[name] / 1e6:.1f}" for name in ("bytes needed", "bytes moved", "bytes moved once")}
        cells = [row["operation"], row["instance"], row["direction"], megabytes["bytes needed"]]
        cells += [megabytes["bytes moved"], f"{row['ratio']:.2f}", megabytes["bytes moved once"]]
        cells += [
            f"{row['ratio once']:.2f}",
            f"{row['FLOPs needed'] / 1e9:.1f}",
            f"{row['FLOPs in products'] / 1e9:.1f}",
        ]
        times = (row["ms"][gpu.name] for gpu in GPUS)
        cells += [f"{ms['needed']:.3f} / {ms['moved']:.3f}" for ms in times]
        lines.append("| " + " | ".join([*cells, published(case, row["direction"])]) + " |")
    return lines


def largest(row: dict[str, Any], count: int = 4) -> str:
    """The arguments that move most, over all kernels of an operation."""
    moved: dict[str, int] = {}
    for kernel, parts in row["kernels"].items():
        for way in ("read", "written"):
            for argument, number in parts[way].items():
                moved[f"{argument} {way} by {kernel.split(' ')[1]}"] = number
    chosen = sorted(moved.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {number / 1e6:.0f}" for name, number in chosen)


def beyond(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| operation | instance | | ratio | ratio once | the most of its MB |", "|---|---|---|---:|---:|---|"]
    for row in rows:
        if row["direction"] != BOTH and row["ratio"] > MOST:
            named = [row["operation"], row["instance"], row["direction"]]
            lines.append(
                "| " + " | ".join([*named, f"{row['ratio']:.2f}", f"{row['ratio once']:.2f}", largest(row)]) + " |"
            )
    return lines


def page(cases: dict[str, list[dict[str, Any]]]) -> str:
    """TRAFFIC.md, of all rows by case."""
    layers = list(LAYERS)
    lines = [
        "<!-- written by python -m benchmarks.kernel_traffic: do not edit -->",
        "",
        "# Bytes that the kernels move, and bytes that must move",
        "",
        "Counted without a GPU. Triton's interpreter runs the launches with the configurations of sm_90 on tensors "
        "that have shapes but no memory, and counts what each program loads, stores and multiplies; a test checks the "
        "count against launches that run. Numbers have 16 bits, states, log decays and partial sums 32. These are "
        "counts, not measurements: no kernel has run on a GPU.",
        "",
        "- **Needed**: every input is read once and every output written once. The backward has the inputs, the "
        "gradients of the outputs, and the gradients of the inputs; what a forward keeps for it is not needed, since "
        "it can be computed again.",
        "- **Moved**: all loads and stores of all programs, and what PyTorch's operations between the kernels read and "
        "write. A tile that several programs read counts for each of them.",
        "- **Once**: in each launch every tensor counts once. The difference to what is moved is read again by other "
        "programs of the same launch, which run close to one another, so that the L2 cache (50 MB) can catch it. "
        "What one launch writes and the next one reads is in both counts, since it is larger than the cache.",
        "- **GFLOP needed**: the recurrence as it is defined, token by token. **In products**: the matrix products "
        "that the launches make. Elementwise work is not counted.",
        "- **ms**: the longer of bytes at the rate of a copy and products at the rate of a large product, launch by "
        "launch: "
        + "; ".join(
            f"{gpu.name} {gpu.bytes / 1e12:.1f} TB/s and {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.source}" for gpu in GPUS
        )
        + ". A lower bound, not a prediction.",
        "",
        "## Why some move more",
        "",
        "- The linear recurrence, forward: each tile of values of a head is a program, which reads the head's q, k and "
        "erase again, at the same time as the others do, so that without a decay per channel little is left once. With "
        "a decay per channel or erase, one kernel writes the scores of every chunk, and the next one reads these and "
        "the same q and k. Where documents and heads do not fill the chip, states are stored and read too.",
        "- The linear recurrence, backward: the forward's states are computed again, and they and their gradients are "
        "stored for every chunk, then read by a program per chunk. This is what lets all chunks run at a time. Storing "
        "them at every second chunk would not move fewer bytes for chunks of 64 tokens and 128 channels: two programs "
        "would read each state, and to compute the one between they would read two tiles of the other chunk, which "
        "together are as large as a state. A pass over a document that needs no stored state exists only without a "
        "decay: the gradient of a decay takes the state and its gradient at the same place.",
        "- The elementwise recurrence: each chunk of 64 tokens (S4: 128) stores its decay and its state, and reads "
        "them three times; S4, whose states are complex and 32 wide for each channel, has more of these than of "
        "tokens. Constants of a layer (S4's q, k and decay) are read by every chunk, mostly from the L2 cache, and "
        "their gradients are written by every chunk and summed by PyTorch.",
        "- The convolution: a program reads its rows once for each of the four taps, and backward sums them again for "
        "each; the repeated reads are of the same tile and come from the first-level cache.",
        "- Tokens to experts: each token is read once for each of its experts.",
        "",
        f"An instance may move {MOST} times what it needs; those that move more are listed below each table with the "
        "tensors that move most.",
        "",
    ]
    for case, rows in cases.items():
        if case in layers:
            lines += [
                f"## The paper's layer, {case}",
                "",
                f"Width {DIM}, {HEADS} heads, each mixer with its own defaults; {EXPERTS} experts of width {FFN_DIM}, "
                f"{ACTIVE} for each token. mom is left out: the router decides its documents; it calls Gated "
                "DeltaNet's recurrence on packed rows. attention has no kernel of ours.",
                "",
                *table(case, rows),
                "",
                f"Beyond {MOST}:",
                "",
                *beyond(rows),
                "",
            ]
    timed = {case: rows for case, rows in cases.items() if case not in layers}
    lines += [
        "## Shapes of published timings",
        "",
        "Milliseconds are the authors' own, of their kernels, read in autumn 2026.",
        "",
        *table("", [])[:2],
        *(
            line.replace(f"| {rows[0]['instance']} |", f"| {case} |")
            for case, rows in timed.items()
            for line in table(case, rows)[2:]
        ),
        "",
        "## Fingerprints of the files",
        "",
        *(f"- {path.name}: {fingerprint(path)}" for path in sorted(KERNELS.glob("*.py"))),
    ]
    return "\n".join(lines) + "\n"


def count(wanted: dict[str, dict[str, Callable[[], Tensor]]]) -> dict[str, list[dict[str, Any]]]:
    counted: dict[str, Kernels] = {}
    found = {}
    with machine(ARCHITECTURE):
        for case, of_case in wanted.items():
            found[case] = rows_of(of_case, counted)
            print(f"{case}: {len(found[case])} rows", flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.parse_args()
    cases = count(programs())
    PAGE.write_text(page(cases))
    RECORD.write_text(json.dumps({"architecture": ARCHITECTURE, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
