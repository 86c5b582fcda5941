"""Finds configurations of the kernels on this machine's GPU: python -m benchmarks.tune_kernels [--output FILE]

A file of kernels/ with configurable launches has a table CONFIGS: key (architecture, width, ..) -> numbers (tiles,
warps, stages). The operation runs once to find the keys that it looks up. For each key the search climbs from the
current configuration: it halves or doubles one number as long as that is faster. A configuration is valid only if the
output and all gradients agree with plain PyTorch in float32. Its cost is the time of forward and backward relative to
that at the start, averaged over instances. The printed table has the entries for CONFIGS. `--most 0` only checks the
current ones.

Without a GPU it runs in Triton's interpreter on tiny sizes, which only tests the program.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's file is imported

from benchmarks.operations import OPERATIONS, OURS, PLAIN, Size, Way, as_leaf, kernel_modules, widened
from benchmarks.report import arguments, seconds_of, show

WIDTHS = (64, 128, 256)
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 1e-4}  # limits of ||x - x'|| / ||x'||
INSTANCES = [name for name, operation in OPERATIONS.items() if {OURS, PLAIN} <= operation.ways.keys()]
Inputs = dict[str, Tensor]


class LookedUp(dict):
    """A dict that records the keys which are looked up."""

    def __init__(self, table: dict):
        super().__init__(table)
        self.keys_seen: list[Any] = []

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self and key not in self.keys_seen:
            self.keys_seen.append(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.get(key)
        return super().__getitem__(key)


def neighbours(configuration: Any) -> Iterator[Any]:
    """Yield configurations with one number halved or doubled."""
    numbers = list(configuration)
    for place, number in enumerate(numbers):
        for other in (number // 2, number * 2):
            if other >= 1:
                changed = [*numbers[:place], other, *numbers[place + 1 :]]
                yield type(configuration)(*changed) if hasattr(configuration, "_fields") else tuple(changed)


def results(way: Way, inputs: Inputs, grad: Tensor | None = None) -> list[Tensor]:
    """Return the output and the gradients of all arguments. grad: gradient of the output; ones if None."""
    given = {name: as_leaf(tensor.detach()) for name, tensor in way.arguments(inputs).items()}
    output = way.run(**given)
    grad = torch.ones_like(output) if grad is None else grad.to(output.dtype)
    return [output, *torch.autograd.grad(output, [x for x in given.values() if x.requires_grad], grad)]


def agrees(found: list[Tensor], expected: list[Tensor], limit: float) -> bool:
    return all((x - y).norm() <= limit * y.norm() for x, y in zip(found, expected, strict=True))  # False for NaN


class Trial:
    """An instance of an operation at one size, with its results in float32 to compare with."""

    def __init__(self, name: str, size: Size, dtype: torch.dtype, device: str):
        self.description = f"{name}, {size}, {dtype}"
        self.way, self.device, self.dtype = OPERATIONS[name].ways[OURS], device, dtype
        self.inputs = OPERATIONS[name].make(size, dtype, device)
        plain, in_float32 = OPERATIONS[name].ways[PLAIN], widened(self.inputs)
        self.grad = torch.randn_like(results(plain, in_float32)[0])
        self.expected = results(plain, in_float32, self.grad)

    def seconds(self, repeats: int) -> float:
        """Return the median time, or inf if the result is wrong or the kernel cannot have the configuration."""
        try:
            if not agrees(results(self.way, self.inputs, self.grad), self.expected, LIMITS[self.dtype]):
                return float("inf")
            run = lambda: results(self.way, self.inputs, self.grad)  # noqa: E731
            return statistics.median(seconds_of(run, self.device) for _ in range(repeats))
        except Exception as failure:
            if self.device == "cuda":
                torch.cuda.synchronize()  # raises again after an illegal access, after which nothing can run
            print(f"  {type(failure).__name__}: {' '.join(str(failure).split())[:100]}")
            return float("inf")


def climb(table: dict, key: Any, cost: Callable[[], float], most_trials: int) -> Iterator[tuple[Any, float]]:
    """Yield each configuration that is tried with its cost, which is 1 for the first. Leaves the best in table[key]."""
    best, best_cost, tried = table[key], 1.0, {table[key]}
    yield best, best_cost
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            if candidate in tried or len(tried) > most_trials:
                continue
            tried.add(candidate)
            table[key] = candidate
            if (candidate_cost := cost()) < 0.99 * best_cost:
                best, best_cost, improved = candidate, candidate_cost, True
            yield candidate, candidate_cost
    table[key] = best


def tune(
    module: ModuleType, family: str, trials: list[Trial], repeats: int, most_trials: int, faults: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each configuration that is tried and, for each key that `trials` look up in module.CONFIGS, a row
    with the best one and the number of those tried. A trial that fails at the start is added to `faults`.

    family: the architecture, which replaces "default" in keys.
    """
    original = module.CONFIGS
    module.CONFIGS = table = LookedUp(original)
    first = [trial.seconds(repeats) for trial in trials]
    faults += [
        f"{trial.description}: wrong, or not run, as configured"
        for trial, seconds in zip(trials, first, strict=True)
        if seconds == float("inf")
    ]
    taking_part = [(trial, seconds) for trial, seconds in zip(trials, first, strict=True) if seconds < float("inf")]

    def cost() -> float:
        return sum(trial.seconds(repeats) / seconds for trial, seconds in taking_part) / len(taking_part)

    for key in list(table.keys_seen) if taking_part else []:
        own_key = (family, *key[1:]) if isinstance(key, tuple) else family
        about = {"file": module.__name__.rpartition(".")[2], "key": repr(own_key)}
        costs = {}
        for configuration, of_first in climb(table, key, cost, most_trials):
            costs[configuration] = of_first
            yield {"of first time": of_first, **about, "configuration": repr(configuration)}
        best = table[key]
        yield {"of first time": costs[best], "tried": len(costs), **about, "configuration": repr(best)}
    module.CONFIGS = original


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", help="files of kernels/, without .py; all with configurations if unset")
    parser.add_argument("--instances", nargs="+", choices=INSTANCES, default=INSTANCES)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each configuration")
    parser.add_argument("--most", type=int, default=60, help="largest number of trials per key; 0 checks the table")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modules = [module for module in kernel_modules() if hasattr(module, "CONFIGS")]
    family = next(module.architecture for module in modules if hasattr(module, "architecture"))(
        torch.empty(0, device=device)
    )
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for width in options.widths:
        heads = 96 * 128 // width if device == "cuda" else 1
        size = Size(1, 4096 if device == "cuda" else 20, heads, width, width, heads)
        for dtype in options.dtypes:
            trials = [Trial(name, size, getattr(torch, dtype), device) for name in options.instances]
            for module in modules:
                if options.files is None or module.__name__.rpartition(".")[2] in options.files:
                    for row in tune(module, family, trials, options.repeats, options.most, faults):
                        print(json.dumps(row), flush=True)
                        rows += [row] if "tried" in row else []
    show("Configurations", rows, options.output, faults=faults)
    print("\n".join(dict.fromkeys(faults)))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
