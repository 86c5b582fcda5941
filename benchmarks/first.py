"""The first minutes of torchlmoe on a GPU: bash benchmarks/gpu.sh --first [--wheels FOLDER] [--rehearse]

At most nine minutes in all, in order of value, for a GPU that is at hand only for a quarter of an hour:

    ceilings   the GPU's own matrix products and copies
    check      every operation on its kernels against plain PyTorch in float32: output and all gradients
    speed      the linear recurrence at B1 T8192 H96 D128, and with shared key heads, beside softmax attention
    decode     one token from a state of 512 MiB or more, beside one read and one write of it
    training   tokens/s, MFU and peak memory of A0.3B-2B in bfloat16
    sweep      configurations of the kernels of the instance that is furthest from its bound, in the time that is left

Every case runs in a process of its own, with a time limit: one that hangs, or leaves the GPU in an error, ends alone.
A piece's JSON file, with hardware and versions, is written after every row, and says `"finished": true` at its end;
what failed, and what did not fit in the time, is in it by name. `--rehearse` runs the same on a CPU, in Triton's
interpreter, on tiny sizes: a test of this program, not a measurement.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's file is imported; the cases' processes inherit it

from benchmarks.kernels import CASES, copy_rate, decode_rows, rows_of
from benchmarks.operations import OPERATIONS, OURS, PLAIN, Size, as_leaf, widened
from benchmarks.report import machine, matmul_rate

SECONDS = 540  # of all pieces together
LIMITS = {"bfloat16": 2e-2, "float16": 2e-2, "float32": 1e-4}  # of ||x - x'|| / ||x'||
TIMED = ["linear attention", "retention", "GLA", "Mamba2", "Gated DeltaNet", "KDA", "RWKV7"]
SHARED_KEYS = Size(batch=1, length=8192, heads=64, key_dim=128, value_dim=128, key_heads=16)
SOFTMAX = "softmax attention"
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """What differs between the GPU and the rehearsal."""

    device: str
    dtype: str
    checked: tuple[str, ...]
    small: Size
    anchor: Size
    shared: Size
    decode: Size
    flavor: str
    tokens: int
    lengths: tuple[int, ...]
    repeats: int


GPU = Scale(
    device="cuda", dtype="bfloat16", checked=("bfloat16", "float32"), small=Size(2, 320, 4, 128, 128, 4),
    anchor=CASES["anchor"], shared=SHARED_KEYS, decode=CASES["decode"],
    flavor="a0.3b_2b", tokens=16384, lengths=(2048, 16384), repeats=20,
)  # fmt: skip
REHEARSED = Scale(
    device="cpu", dtype="float32", checked=("float32",), small=Size(1, 20, 1, 16, 16, 1),
    anchor=Size(1, 20, 1, 16, 16, 1), shared=Size(1, 20, 2, 16, 16, 1), decode=Size(2, 1, 1, 16, 16, 1),
    flavor="debug", tokens=64, lengths=(32, 64), repeats=1,
)  # fmt: skip


# Cases: each yields rows, from a process of its own.


def ceilings(scale: Scale) -> Iterator[Row]:
    yield {
        "matmul TFLOP/s": matmul_rate(getattr(torch, scale.dtype), scale.device, 8192 if scale == GPU else 64) / 1e12
    }
    yield {"copy TB/s": copy_rate(scale.device) / 1e12}


def check(name: str, scale: Scale) -> Iterator[Row]:
    """Errors of output and gradients. On a GPU what is timed later runs once, too, so that its kernels are compiled
    by many processes at a time: Triton keeps them on disk."""
    yield from _check_in(scale.checked[0], name, scale)
    if name in TIMED and scale == GPU:
        for size in (scale.anchor, scale.shared) if name == "Gated DeltaNet" else (scale.anchor,):
            begin = time.perf_counter()
            _results(OPERATIONS[name].ways[OURS], OPERATIONS[name].make(size, torch.bfloat16, scale.device))
            torch.cuda.synchronize()
            yield {"operation": name, "size": str(size), "first run s": time.perf_counter() - begin}
    for dtype in scale.checked[1:]:  # the slowest to compile
        yield from _check_in(dtype, name, scale)


def _check_in(dtype: str, name: str, scale: Scale) -> Iterator[Row]:
    operation = OPERATIONS[name]
    inputs = operation.make(scale.small, getattr(torch, dtype), scale.device)
    plain = _results(operation.ways[PLAIN], widened(inputs))
    ours = _results(operation.ways[OURS], inputs)
    errors = {key: _error(ours[key], plain[key]) for key in plain}
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    row: Row = {"operation": name, "dtype": dtype, "size": str(scale.small), "worst error": errors[worst]}
    # Not above the limit, and a number.
    yield row | {"of": worst, "passed": errors[worst] <= LIMITS[dtype], "errors": errors}


def _results(way, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output, and the gradients of all arguments under one that is the same for every way."""
    given = {name: as_leaf(tensor.detach()) for name, tensor in way.arguments(inputs).items()}
    output = way.run(**given)
    generator = torch.Generator(output.device).manual_seed(0)
    grad = torch.randn(output.shape, device=output.device, generator=generator).to(output.dtype)
    leaves = {name: x for name, x in given.items() if x.requires_grad}
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **{f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def speed(name: str, size: Size, scale: Scale, rates: Row) -> Iterator[Row]:
    ways = OPERATIONS[name].ways
    ways = {by: way for by, way in ways.items() if by != PLAIN and by in (OURS, "FlashAttention (SDPA)")}
    failures: list[str] = []
    for row in rows_of(name, ways, size, getattr(torch, scale.dtype), scale.device, scale.repeats, failures):
        matmul, copy = rates["matmul TFLOP/s"], rates["copy TB/s"]
        for column, of in (("fwd ms", ""), ("fwd+bwd ms", " both")):
            if row[column] is not None:
                share = max(row[f"TFLOP/s{of}"] / matmul, row[f"TB/s{of}"] / copy)
                row[f"x bound, {column.split()[0]}"] = 1 / share
        yield row | {"size": str(size), "dtype": scale.dtype, "failures": failures}


def decode(name: str, scale: Scale) -> Iterator[Row]:
    failures: list[str] = []
    operation, size = OPERATIONS[name], scale.decode
    while prod(operation.state_shape(size)) < prod(OPERATIONS["GLA"].state_shape(scale.decode)):
        size = replace(size, batch=2 * size.batch)
    ways = {OURS: operation.decode_ways[OURS]}
    for row in decode_rows(name, ways, size, getattr(torch, scale.dtype), scale.device, scale.repeats, failures):
        state = prod(operation.state_shape(size)) * 4 / 2**20
        yield row | {"size": str(size), "dtype": scale.dtype, "state MiB": state, "failures": failures}


def training(mixer: str, scale: Scale) -> Iterator[Row]:
    from benchmarks import throughput
    from torchlmoe.layers import initialization
    from torchlmoe.training.peak import peak_flops

    def draw_on_the_device(parameter: torch.Tensor, draw: Callable[..., object]) -> None:
        """The same distributions, of other numbers: drawing two billion of them on a CPU takes half a minute."""
        whole = torch.empty(parameter.shape, device=parameter.device)
        draw(whole, None)
        with torch.no_grad():
            parameter.copy_(whole)

    initialization.fill_ = draw_on_the_device
    settings = ["--model.flavor", scale.flavor, "--model.layer_pattern", "L", "--training.dtype", "bfloat16"]
    settings += ["--activation_checkpoint.mode", "selective"]
    peak = peak_flops(torch.device(scale.device), torch.bfloat16)
    failures: list[str] = []
    repeats = min(5, scale.repeats)
    for row in throughput.rows_of(mixer, settings, list(scale.lengths), scale.tokens, repeats, failures):
        row["MFU"] = row.pop("FLOP/s") / peak if peak and row["tokens/s"] else None
        yield row | {"flavor": scale.flavor, "dtype": "bfloat16", "recompute": "selective", "failures": failures}


def sweep(name: str, scale: Scale) -> Iterator[Row]:
    """Of the kernels that the instance runs at width 128; the time limit ends it."""
    from benchmarks.operations import kernel_modules
    from benchmarks.tune_kernels import Trial, tune

    size = replace(scale.anchor, length=min(scale.anchor.length, 4096))
    trial = Trial(name, size, getattr(torch, scale.dtype), scale.device)
    modules = [module for module in kernel_modules() if hasattr(module, "CONFIGS")]
    x = torch.empty(0, device=scale.device)
    family = next(module.architecture(x) for module in modules if hasattr(module, "architecture"))
    faults: list[str] = []
    for module in sorted(modules, key=lambda module: "linear_recurrence" not in module.__name__):
        for row in tune(module, family, [trial], min(5, scale.repeats), 24 if scale == GPU else 1, faults):
            yield row | {"instance": name, "size": str(size), "dtype": scale.dtype, "faults": faults}


# Running them.


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[..., Iterator[Row]]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Piece:
    """seconds: of the piece; at_once: how many of its cases run at a time."""

    name: str
    seconds: float
    cases: list[Case]
    at_once: int = 1


class Record:
    """A piece's rows, in a JSON file that is whole after every change."""

    def __init__(self, path: Path, piece: Piece, about: Row):
        self.path, self.lock = path, threading.Lock()
        waiting = [case.name for case in piece.cases]
        self.content = {
            "piece": piece.name,
            **about,
            "finished": False,
            "rows": [],
            "failures": {},
            "not done": waiting,
        }
        self.write()

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    def add(self, row: Row) -> None:
        with self.lock:
            self.content["rows"].append(row)
            self.write()
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
        print("  " + ", ".join(f"{key} {value}" for key, value in shown.items() if not isinstance(value, (dict, list))))

    def end(self, case: Case, failure: str | None) -> None:
        with self.lock:
            if failure is not None:
                self.content["failures"][case.name] = failure
                print(f"  {case.name}: {failure}", flush=True)
            self.content["not done"].remove(case.name)
            self.write()


def run_piece(piece: Piece, folder: Path, about: Row, deadline: float) -> Row:
    """Its record. Nothing of it runs beyond its seconds, or beyond the deadline of all."""
    end = min(time.monotonic() + piece.seconds, deadline)
    print(f"{piece.name}: at most {end - time.monotonic():.0f} s", flush=True)
    record = Record(folder / f"{piece.name}.json", piece, about)

    def run(case: Case) -> None:
        if time.monotonic() < end:
            record.end(case, _run_case(case, record, end))

    with ThreadPoolExecutor(piece.at_once) as pool:
        list(pool.map(run, piece.cases))
    record.content["finished"] = not record.content["not done"]
    record.write()
    return record.content


def _run_case(case: Case, record: Record, end: float) -> str | None:
    """Why it failed, if it did."""
    # A process forked from one that has looked at a GPU cannot use it; without a GPU, imports cost more than a fork.
    context = mp.get_context("forkserver" if os.environ.get("TRITON_INTERPRET") == "1" else "spawn")
    context.set_forkserver_preload(["benchmarks.throughput", "benchmarks.tune_kernels"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sending, case), daemon=True)
    process.start()
    sending.close()
    failure = None
    try:
        while receiving.poll(max(0.0, end - time.monotonic())):
            kind, value = receiving.recv()
            if kind == "row":
                record.add(value)
            else:
                failure = value
                break
        else:
            failure = "stopped, since the piece's time was over"
    except EOFError:
        process.join()
        failure = f"its process ended with exit code {process.exitcode}"
    process.kill()
    process.join()
    return failure


def _serve(pipe: Connection, case: Case) -> None:
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        for row in case.run(*case.arguments):
            pipe.send(("row", row))
        pipe.send(("end", None))
    except Exception as error:  # another library's, or of the GPU: a line of the record
        pipe.send(("end", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def furthest_from_bound(rows: list[Row]) -> str | None:
    slow = [row for row in rows if row["by"] == OURS and row.get("x bound, fwd+bwd")]
    return max(slow, key=lambda row: row["x bound, fwd+bwd"])["operation"] if slow else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in the interpreter, on tiny sizes")
    options = parser.parse_args()
    scale = REHEARSED if options.rehearse else GPU
    if scale == GPU and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here; --rehearse runs without one.")
    begin = time.monotonic()
    deadline = begin + SECONDS
    options.output.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "clock": "CUDA events" if scale == GPU else "wall clock of a CPU: a rehearsal"}
    records: dict[str, Row] = {}

    def run(name: str, seconds: float, cases: list[Case], at_once: int = 1) -> list[Row]:
        at_once = at_once if scale == GPU else 2  # the rehearsal measures nothing
        records[name] = run_piece(Piece(name, seconds, cases, at_once), options.output, about, deadline)
        return records[name]["rows"]

    rates: Row = {}
    for row in run("ceilings", 30, [Case("ceilings", ceilings, (scale,))]):
        rates |= row
    checked = [name for name, operation in OPERATIONS.items() if {OURS, PLAIN} <= operation.ways.keys()]
    checked.sort(key=lambda name: name not in TIMED)
    run("check", 100, [Case(name, check, (name, scale)) for name in checked], at_once=12)
    timed = [(name, scale.anchor) for name in (*TIMED, SOFTMAX)] + [("Gated DeltaNet", scale.shared)]
    if {"matmul TFLOP/s", "copy TB/s"} <= rates.keys():
        speeds = run("speed", 130, [Case(f"{name}, {size}", speed, (name, size, scale, rates)) for name, size in timed])
    else:
        speeds = []
    decoded = [name for name, operation in OPERATIONS.items() if OURS in operation.decode_ways]
    run("decode", 60, [Case(name, decode, (name, scale)) for name in decoded])
    mixers = ("gated_deltanet", "mamba2", "attention")
    run("training", 190, [Case(mixer, training, (mixer, scale)) for mixer in mixers])
    if (name := furthest_from_bound(speeds)) is not None:
        run("sweep", SECONDS, [Case(name, sweep, (name, scale))])

    print(f"\n{time.monotonic() - begin:.0f} s, in {options.output}:")
    wrong = 0
    for name, record in records.items():
        bad = [f"{row['operation']} ({row['dtype']})" for row in record["rows"] if row.get("passed") is False]
        parts = [f"{len(record['rows'])} rows"]
        parts += [f"wrong: {', '.join(bad)}"] if bad else []
        parts += [f"failed: {', '.join(record['failures'])}"] if record["failures"] else []
        parts += [f"did not fit: {', '.join(record['not done'])}"] if record["not done"] else []
        print(f"  {name}: {'; '.join(parts)}")
        wrong += len(bad) + len(record["failures"]) * (name != "sweep") + len(record["not done"])
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
