"""Bytes and time of context parallelism: python -m benchmarks.sequence_parallel [--picture FILE]

Counts: every parallel style of recurrences and attention runs on a fake process group of `--ranks` ranks, on tensors
without storage, over one document of 4k to 1M tokens. The collectives and the bytes that a rank sends, forward and
backward, are counted from the operations and shown beside a formula. In an all-gather a rank sends its tensor to each
other rank, and in a reduce-scatter a part of its tensor to each. In a ring it sends one state to the next rank.

Times: forward and backward on 2 gloo processes of one thread each, with the styles in turn.
"""

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from math import lcm
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import arguments, show
from torchlmoe.layers.elementwise_recurrence import ElementwiseRecurrence
from torchlmoe.layers.recurrence import LinearRecurrence
from torchlmoe.mixers.attention import InnerAttention

HEADS, KV_HEADS, WIDTH = 8, 2, 64  # keys and values are equally wide
LENGTHS = tuple(4096 * 4**power for power in range(5))
TIMED_LENGTHS = (1024, 4096, 16384)
FLOAT = 4  # bytes; states are sent in float32, and here keys and values too
STATE = WIDTH * WIDTH
# name -> (module, terms besides q, k and v, numbers in the affine map of one head)
RECURRENCES: dict[str, tuple[type[nn.Module], tuple[str, ...], int]] = {
    "no decay": (LinearRecurrence, (), STATE),
    "scalar decay": (LinearRecurrence, ("scalar",), STATE + 1),
    "channel decay": (LinearRecurrence, ("channel",), STATE + WIDTH),
    "value decay": (LinearRecurrence, ("value",), STATE + WIDTH),
    "gated delta rule": (LinearRecurrence, ("scalar", "beta"), STATE + WIDTH * WIDTH),
    "element by element": (ElementwiseRecurrence, ("rate", "step"), 2 * STATE),
}
TIMED = ("scalar decay", "gated delta rule", "softmax attention")


def cases() -> dict[str, tuple[str, str]]:
    """Return name -> (recurrence or attention, way of communication)."""
    recurrences = {f"{name}, {how}": (name, how) for name in RECURRENCES for how in ("all_gather", "ring")}
    attention = {f"softmax attention, {how}": ("softmax attention", how) for how in ("all_gather", "ulysses")}
    return recurrences | attention


def formula(what: str, how: str, ranks: int, length: int) -> int:
    """Return the bytes that a rank sends in one direction, forward or backward."""
    span = length // ranks
    if what == "softmax attention":
        if how == "all_gather":
            return (ranks - 1) * 2 * span * KV_HEADS * WIDTH * FLOAT
        heads = 2 * HEADS + 2 * lcm(KV_HEADS, ranks)
        return (ranks - 1) * span * heads * WIDTH * FLOAT // ranks
    return HEADS * FLOAT * (STATE if how == "ring" else (ranks - 1) * RECURRENCES[what][2])


class Sent(TorchDispatchMode):
    """Counts the communication within the mode: the number of `calls`, and the `bytes` that this rank sends."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.calls, self.bytes = ranks, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.name().split("::")[-1]
        others = self.ranks - 1
        sent = {
            "all_gather_into_tensor": lambda: others * _bytes(args[0]),
            "reduce_scatter_tensor": lambda: others * _bytes(result),
            "all_to_all_single": lambda: others * _bytes(args[0]) // self.ranks,
            "send_state": lambda: _bytes(args[1]),
            "send_gradient": lambda: _bytes(args[0]),
        }.get(name)
        if sent is not None:
            self.calls += 1
            self.bytes += sent()
        return result


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def build(what: str, how: str, mesh: DeviceMesh, length: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a function that runs the module on this rank's span of a document of `length` tokens, and its inputs."""
    tokens = (1, length // mesh.size(), HEADS)
    if what == "softmax attention":
        keys = (*tokens[:2], KV_HEADS, WIDTH)
        module: nn.Module = InnerAttention(HEADS)
        inputs = {"q": torch.randn(*tokens, WIDTH), "k": torch.randn(keys), "v": torch.randn(keys)}
        style = module.context_parallel_style("all_gather", how)  # type: ignore[operator]
    else:
        kind, terms, _ = RECURRENCES[what]
        module = kind()
        terms_of: dict[str, Callable[[], dict[str, Tensor]]] = {
            "scalar": lambda: {"log_decay": F.logsigmoid(torch.randn(tokens))},
            "channel": lambda: {"log_decay": F.logsigmoid(torch.randn(*tokens, WIDTH))},
            "value": lambda: {"value_log_decay": F.logsigmoid(torch.randn(*tokens, WIDTH))},
            "beta": lambda: {"erase": torch.rand(tokens)},
            "rate": lambda: {"log_decay": -torch.rand(HEADS, WIDTH, WIDTH)},
            "step": lambda: {"step": torch.rand(*tokens, WIDTH)},
        }
        inputs = {name: torch.randn(*tokens, WIDTH) for name in ("q", "k", "v")}
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
        for term in terms:
            inputs |= terms_of[term]()
        style = module.context_parallel_style(how, "all_gather")  # type: ignore[operator]
    parallelize_module(module, mesh, style)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}

    def run() -> Tensor:
        q, k, v, *_ = inputs.values()
        result = module(q, k, v, **{name: x for name, x in inputs.items() if name not in ("q", "k", "v")})
        return result[0] if isinstance(result, tuple) else result

    return run, list(inputs.values())


def count(ranks: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Count as the second rank of `ranks`, which has neighbors on both sides."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    rows = []
    for name, (what, how) in cases().items():
        for length in lengths:
            with FakeTensorMode(shape_env=ShapeEnv()):
                run, inputs = build(what, how, mesh, length)
                with Sent(ranks) as forward:
                    o = run()
                with Sent(ranks) as backward:
                    torch.autograd.grad(o, inputs, torch.ones_like(o))
            rows.append(
                {
                    "style": name,
                    "T": length,
                    "calls": f"{forward.calls} + {backward.calls}",
                    "forward KiB": forward.bytes / 1024,
                    "backward KiB": backward.bytes / 1024,
                    "formula KiB": formula(what, how, ranks, length) / 1024,
                }
            )
    dist.destroy_process_group()
    return rows


def measure(rank: int, ranks: int, port: int, lengths: tuple[int, ...], repeats: int, path: str) -> None:
    """Measure the milliseconds of forward and backward: medians over rounds in which every style runs once."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks,))
    times: dict[str, dict[int, float]] = {}
    for length in lengths:
        chosen = {name: case for name, case in cases().items() if case[0] in TIMED}
        built = {name: build(*case, mesh, length) for name, case in chosen.items()}
        seconds: dict[str, list[float]] = {name: [] for name in built}
        for _ in range(repeats + 1):  # the first is a warm-up
            for name, (run, inputs) in built.items():
                dist.barrier()
                begin = time.perf_counter()
                o = run()
                torch.autograd.grad(o, inputs, torch.ones_like(o))
                dist.barrier()
                seconds[name].append(time.perf_counter() - begin)
        for name, taken in seconds.items():
            times.setdefault(name, {})[length] = 1e3 * statistics.median(taken[1:])
    if rank == 0:
        torch.save(times, path)
    dist.destroy_process_group()


def time_styles(lengths: tuple[int, ...], repeats: int, ranks: int = 2) -> dict[str, dict[int, float]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/times.pt"
        mp.spawn(measure, (ranks, port, lengths, repeats, path), nprocs=ranks)
        return torch.load(path)


def draw(rows: list[dict[str, Any]], times: dict[str, dict[int, float]], ranks: int, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    for name in cases():
        dashes = "-" if name.endswith("all_gather") else "--"
        color = f"C{list(RECURRENCES).index(cases()[name][0])}" if cases()[name][0] in RECURRENCES else "black"
        points = [(row["T"], row["forward KiB"] + row["backward KiB"]) for row in rows if row["style"] == name]
        left.plot(*zip(*points, strict=True), dashes, color=color, marker=".", label=name)
        if name in times:
            right.plot(list(times[name]), list(times[name].values()), dashes, color=color, marker=".", label=name)
    for axes, what in ((left, f"KiB a rank sends, both directions ({ranks} ranks)"), (right, "ms, 2 gloo ranks")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the document", ylabel=what)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.suptitle(
        f"Sequence parallelism, one layer of {HEADS} heads (attention: {KV_HEADS} of keys), K = V = {WIDTH}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"drawn in {path}")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--ranks", type=int, default=8, help="ranks for the counts")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens for the counts")
    parser.add_argument("--timed-lengths", type=int, nargs="*", default=TIMED_LENGTHS, help="tokens for the times")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--picture", type=Path, help="draw both in this PNG file")
    options = parser.parse_args()
    rows = count(options.ranks, tuple(options.lengths))
    times = time_styles(tuple(options.timed_lengths), options.repeats) if options.timed_lengths else {}
    for row in rows:
        row["ms on 2 ranks"] = times.get(row["style"], {}).get(row["T"], "")
    show(f"Sequence parallelism, {HEADS} heads, K = V = {WIDTH}, {options.ranks} ranks", rows, options.output)
    if options.picture:
        draw(rows, times, options.ranks, options.picture)


if __name__ == "__main__":
    main()
