"""The first minutes of torchlmoe on a GPU: bash benchmarks/gpu.sh --first [--wheels FOLDER] [--rehearse]

It takes at most nine minutes, for a GPU that is available for a quarter of an hour. The most valuable piece is first:

    ceilings   rates of matrix products and copies on the GPU
    check      the kernels of every operation compared with plain PyTorch in float32: output and all gradients
    speed      the linear recurrence at B1 T8192 H96 D128, and with shared key heads, beside softmax attention
    decode     one token from a state of 512 MiB or more, beside the time to copy the state
    training   tokens/s, MFU and peak memory of A0.3B-2B in bfloat16
    sweep      configurations of the kernels that are furthest from their bound, in the remaining time

Every case runs in a separate process, which imports while the preceding case runs, and gets at most half of the piece's
remaining time while others wait. So a case that hangs, or leaves the GPU in an error, affects no other.
The JSON file of a piece, with hardware and versions, is written after every row, and has `"finished": true` at the end.
It names the cases that failed and those that did not fit in the time. `--rehearse` runs the same program on a CPU, in
Triton's interpreter, with tiny sizes and without the packages that only training needs. It tests the program, not the
speed of kernels.
"""

import argparse
import json
import os
import re
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
from benchmarks.operations import OPERATIONS, OURS, PLAIN, Size, Way, as_leaf, kernel_modules, widened
from benchmarks.report import machine, matmul_rate

SECONDS = 540  # for all pieces together
LIMITS = {"bfloat16": 2e-2, "float16": 2e-2, "float32": 1e-4}  # limits of ||x - x'|| / ||x'||
TIMED = ["linear attention", "retention", "GLA", "Mamba2", "Gated DeltaNet", "KDA", "RWKV7"]
SHARED_KEYS = Size(batch=1, length=8192, heads=64, key_dim=128, value_dim=128, key_heads=16)
SOFTMAX = "softmax attention"
SHALLOW = ("--model.num_layers", "1", "--model.vocab_size", "4096")  # runs the same kernels as the whole model
OPTIONAL = {"pydantic", "pydantic_core", "tensordict", "rich", "torchao", "datasets", "tomli", "tomli_w", "zstandard"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Sizes that differ between the GPU and the rehearsal."""

    device: str
    dtype: str
    checked: tuple[str, ...]
    small: Size
    anchor: Size
    shared: Size
    decode: Size
    warmed: tuple[str, ...]
    flavor: str
    tokens: int
    lengths: tuple[int, ...]
    repeats: int


GPU = Scale(
    device="cuda", dtype="bfloat16", checked=("bfloat16", "float32"), small=Size(2, 320, 4, 128, 128, 4),
    anchor=CASES["anchor"], shared=SHARED_KEYS, decode=CASES["decode"],
    warmed=tuple(OPERATIONS),
    flavor="a0.3b_2b", tokens=16384, lengths=(2048, 16384), repeats=20,
)  # fmt: skip
REHEARSED = Scale(
    device="cpu", dtype="float32", checked=("float32",), small=Size(1, 20, 1, 16, 16, 1),
    anchor=Size(1, 20, 1, 16, 16, 1), shared=Size(1, 20, 2, 16, 16, 1), decode=Size(2, 1, 1, 16, 16, 1),
    warmed=("Gated DeltaNet",),
    flavor="debug", tokens=64, lengths=(32, 64), repeats=1,
)  # fmt: skip


# Cases: each yields rows, from a separate process.


def ceilings(scale: Scale) -> Iterator[Row]:
    size, repeats = (8192, 30) if scale == GPU else (64, 1)  # enough repeats for the GPU to raise its clock
    rate = matmul_rate(getattr(torch, scale.dtype), scale.device, size, repeats)
    yield {"matmul TFLOP/s": rate / 1e12, "size": f"{size} x {size} x {size}", "dtype": scale.dtype}
    yield {"copy TB/s": copy_rate(scale.device) / 1e12, "size": "1 GiB" if scale == GPU else "64 MiB"}


def check(name: str, scale: Scale) -> Iterator[Row]:
    """Yield the errors of output and gradients. A failure ends only its own row.

    Cases that are timed later also run once here, so that many processes compile their kernels at the same time: Triton
    keeps compiled kernels on disk.
    """
    for dtype in scale.checked:
        yield _tried({"operation": name, "dtype": dtype, "size": str(scale.small)}, _compared, name, dtype, scale)
        if dtype == scale.dtype and name in scale.warmed:  # before float32, which takes long to compile on a GPU
            for size, run in _timed_later(name, scale):
                yield _tried({"operation": name, "dtype": dtype, "size": str(size)}, _first_run, run)


def _tried(row: Row, measure: Callable[..., Row], *args: Any) -> Row:
    try:
        return row | measure(*args)
    except Exception as error:  # out of memory or shared memory, or a kernel that does not compile
        return row | {"passed": False, "failure": _sentence(error)}


def _compared(name: str, dtype: str, scale: Scale) -> Row:
    operation = OPERATIONS[name]
    inputs = operation.make(scale.small, getattr(torch, dtype), scale.device)
    plain = _results(operation.ways[PLAIN], widened(inputs))
    ours = _results(operation.ways[OURS], inputs)
    errors = {key: _error(ours[key], plain[key]) for key in plain}
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    # False for NaN too.
    passed = errors[worst] <= LIMITS[dtype]
    return {"worst error": errors[worst], "of": worst, "passed": passed, "errors": errors}


def _timed_later(name: str, scale: Scale) -> Iterator[tuple[Size, Callable[[], object]]]:
    operation, dtype = OPERATIONS[name], getattr(torch, scale.dtype)
    ours = operation.ways[OURS]
    for size in [scale.anchor] * (name in TIMED) + [scale.shared] * (name == "Gated DeltaNet"):
        yield size, lambda size=size: _results(ours, operation.make(size, dtype, scale.device))
    if step := operation.decode_ways.get(OURS):
        size = replace(scale.decode, batch=2)
        state = torch.zeros(operation.state_shape(size), device=scale.device)
        inputs = operation.make(size, dtype, scale.device) | {"initial_state": state}
        yield size, lambda: step.run(**step.arguments(inputs))


def _first_run(run: Callable[[], object]) -> Row:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"first run, compilation included, s": time.perf_counter() - begin}


def _results(way: Way, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of all arguments. The gradient of the output is the same for every way."""
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


def training(mixer: str, scale: Scale, *settings_of_model: str) -> Iterator[Row]:
    from benchmarks import throughput
    from torchlmoe.layers import initialization
    from torchlmoe.training.peak import peak_flops

    def draw_on_the_device(parameter: torch.Tensor, draw: Callable[..., object]) -> None:
        """Draw from the same distribution on the GPU: drawing two billion numbers on a CPU takes half a minute."""
        whole = torch.empty(parameter.shape, device=parameter.device)
        draw(whole, None)
        with torch.no_grad():
            parameter.copy_(whole)

    initialization.fill_ = draw_on_the_device
    settings = ["--model.flavor", scale.flavor, "--model.layer_pattern", "L", "--training.dtype", "bfloat16"]
    settings += ["--activation_checkpoint.mode", "selective", *settings_of_model]
    peak = peak_flops(torch.device(scale.device), torch.bfloat16)
    failures: list[str] = []
    repeats = min(5, scale.repeats)
    for row in throughput.rows_of(mixer, settings, list(scale.lengths), scale.tokens, repeats, failures):
        row["MFU"] = row.pop("FLOP/s") / peak if peak and row["tokens/s"] else None
        about = {"flavor": " ".join((scale.flavor, *settings_of_model)), "dtype": "bfloat16", "recompute": "selective"}
        yield row | about | {"failures": failures}


def sweep(name: str, scale: Scale) -> Iterator[Row]:
    """Yield configurations of the kernels that the instance runs. The time limit ends it."""
    from benchmarks.tune_kernels import Trial, tune

    size = replace(scale.anchor, length=min(scale.anchor.length, 4096))
    trial = Trial(name, size, getattr(torch, scale.dtype), scale.device)
    modules = [
        module
        for module in kernel_modules()
        if re.search("(recurrence_launch|linear_recurrence_backward)$", module.__name__)
    ]
    x = torch.empty(0, device=scale.device)
    family = next(module.architecture(x) for module in modules if hasattr(module, "architecture"))
    faults: list[str] = []
    for module in modules:
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
    """seconds: time limit of the piece. at_once: number of cases that run at a time, while one more imports."""

    name: str
    seconds: float
    cases: list[Case]
    at_once: int = 1


class Record:
    """The rows of a piece, in a JSON file that is complete after every change."""

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
    """Run a piece and return its record. No case runs beyond the piece's time limit or the deadline of all pieces."""
    end = min(time.monotonic() + piece.seconds, deadline)
    print(f"{piece.name}: at most {end - time.monotonic():.0f} s", flush=True)
    record = Record(folder / f"{piece.name}.json", piece, about)

    turns = threading.Semaphore(piece.at_once)
    begun = [threading.Event() for _ in piece.cases]  # keeps the order if a process imports faster

    def limit() -> float:
        """Return the time limit of the next case in seconds."""
        left = end - time.monotonic()
        return left / 2 if len(record.content["not done"]) > piece.at_once else left

    def run(place: int, case: Case) -> None:
        try:
            if time.monotonic() < end:
                with _Process(case) as process:
                    if place:
                        begun[place - 1].wait()
                    with turns:
                        begun[place].set()
                        if (seconds := limit()) > 0:
                            record.end(case, process.run(record.add, seconds))
        except OSError as error:  # no process could be started
            record.end(case, _sentence(error))
        finally:
            begun[place].set()

    with ThreadPoolExecutor(piece.at_once + 1) as pool:
        list(pool.map(run, range(len(piece.cases)), piece.cases))
    record.content["finished"] = not record.content["not done"]
    record.write()
    return record.content


class _Process:
    """The process of a case. It imports immediately, and runs the case when `run` is called."""

    def __init__(self, case: Case):
        # CUDA cannot be used in a fork of a process that has initialized it. Without a GPU, a fork saves the imports.
        context = mp.get_context("forkserver" if os.environ.get("TRITON_INTERPRET") == "1" else "spawn")
        context.set_forkserver_preload(["benchmarks.tune_kernels"])
        self.pipe, pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(pipe, case), daemon=True)
        self.process.start()
        pipe.close()

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join(10)  # a process that hangs in the driver is left behind

    def run(self, add: Callable[[Row], None], seconds: float) -> str | None:
        """Pass the rows to `add`. Returns the reason of a failure, or None."""
        end = time.monotonic() + seconds
        try:
            self.pipe.send("run")
            while self.pipe.poll(max(0.0, end - time.monotonic())):
                kind, value = self.pipe.recv()
                if kind == "end":
                    return value
                add(value)
            return f"stopped at its time limit of {seconds:.0f} s"
        except (EOFError, OSError):
            self.process.join(10)
            return f"its process ended with exit code {self.process.exitcode}"


class _Absent:
    """Raises an error for imports of packages that a machine which only runs kernels may lack."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named '{name}': kernels must run without it.", name=name)


def _serve(pipe: Connection, case: Case) -> None:
    if "--rehearse" in sys.argv and case.run is not training:
        sys.meta_path.insert(0, _Absent())
    torch.manual_seed(0)
    try:
        kernel_modules()
        pipe.recv()
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        for row in case.run(*case.arguments):
            pipe.send(("row", row))
        pipe.send(("end", None))
    except Exception as error:  # of another library or of the GPU: it becomes a line of the record
        pipe.send(("end", _sentence(error)))


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
        rates |= {name: value for name, value in row.items() if isinstance(value, float)}
    checked = [name for name, operation in OPERATIONS.items() if {OURS, PLAIN} <= operation.ways.keys()]
    checked.sort(key=lambda name: name not in TIMED)
    cases = [Case(name, check, (name, scale)) for name in checked]
    mixers = ("gated_deltanet", "mamba2", "attention")
    if scale == GPU:  # their kernels are compiled beside the others
        once = replace(scale, repeats=1)
        cases += [Case(f"{mixer}, one layer", training, (mixer, once, *SHALLOW)) for mixer in mixers]
    run("check", 100, cases, at_once=len(cases))
    timed = [(name, scale.anchor) for name in (*TIMED, SOFTMAX)] + [("Gated DeltaNet", scale.shared)]
    if {"matmul TFLOP/s", "copy TB/s"} <= rates.keys():
        speeds = run("speed", 130, [Case(f"{name}, {size}", speed, (name, size, scale, rates)) for name, size in timed])
    else:
        speeds = []
    decoded = [name for name, operation in OPERATIONS.items() if OURS in operation.decode_ways]
    run("decode", 60, [Case(name, decode, (name, scale)) for name in decoded])
    changes = () if scale == GPU else SHALLOW
    run("training", 190, [Case(mixer, training, (mixer, scale, *changes)) for mixer in mixers])
    if (name := furthest_from_bound(speeds)) is not None:
        run("sweep", SECONDS, [Case(name, sweep, (name, scale))])

    seconds = time.monotonic() - begin
    print(f"\n{about['machine']['gpu']}, torch {torch.__version__}, {seconds:.0f} s, in {options.output}:")
    wrong = 0
    for name, record in records.items():
        bad = [f"{row['operation']} ({row['dtype']})" for row in record["rows"] if row.get("passed") is False]
        bad += dict.fromkeys(note for row in record["rows"] for note in row.get("failures", ()))
        parts = [f"{len(record['rows'])} rows"]
        parts += [f"wrong: {', '.join(bad)}"] if bad else []
        parts += [f"failed: {', '.join(record['failures'])}"] if record["failures"] else []
        parts += [f"did not fit: {', '.join(record['not done'])}"] if record["not done"] else []
        print(f"  {name}: {'; '.join(parts)}")
        wrong += len(bad) + len(record["failures"]) * (name != "sweep") + len(record["not done"])
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
