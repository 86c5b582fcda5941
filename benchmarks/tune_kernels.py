"""Finds the kernels' configurations anew on this machine's GPU: python -m benchmarks.tune_kernels [--output FILE]

Every file of kernels/ whose launches are configured has a table CONFIGS: a key (architecture, width, ..) -> numbers
(tiles, warps, stages). The operation is run to see which keys it looks up, and each of them is climbed from: any number
of the configuration is halved or doubled, as long as that is faster. A configuration counts only if the output and all
gradients agree with plain PyTorch in float32; its time is that of forward and backward, summed over instances in
units of what each takes at the start. The table it prints has the entries for CONFIGS. `--most 0` only checks those
in use.

Without a GPU it runs in Triton's interpreter on tiny sizes, which tests the program and finds nothing.
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
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 1e-4}  # of ||x - x'|| / ||x'||
INSTANCES = [name for name, operation in OPERATIONS.items() if {OURS, PLAIN} <= operation.ways.keys()]
Inputs = dict[str, Tensor]


class LookedUp(dict):
    """A table that notes what is looked up in it."""

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
    """Those with one number halved or doubled, of the same type."""
    numbers = list(configuration)
    for place, number in enumerate(numbers):
        for other in (number // 2, number * 2):
            if other >= 1:
                changed = [*numbers[:place], other, *numbers[place + 1 :]]
                yield type(configuration)(*changed) if hasattr(configuration, "_fields") else tuple(changed)


def results(way: Way, inputs: Inputs, grad: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of all arguments; grad: of the output, ones if not given."""
    given = {name: as_leaf(tensor.detach()) for name, tensor in way.arguments(inputs).items()}
    output = way.run(**given)
    grad = torch.ones_like(output) if grad is None else grad.to(output.dtype)
    return [output, *torch.autograd.grad(output, [x for x in given.values() if x.requires_grad], grad)]


def agrees(found: list[Tensor], expected: list[Tensor], limit: float) -> bool:
    return all((x - y).norm() <= limit * y.norm() for x, y in zip(found, expected, strict=True))  # false of NaN


class Trial:
    """An instance at a size: what it gives in float32, and how long it takes."""

    def __init__(self, name: str, size: Size, dtype: torch.dtype, device: str):
        self.description = f"{name}, {size}, {dtype}"
        self.way, self.device, self.dtype = OPERATIONS[name].ways[OURS], device, dtype
        self.inputs = OPERATIONS[name].make(size, dtype, device)
        plain, in_float32 = OPERATIONS[name].ways[PLAIN], widened(self.inputs)
        self.grad = torch.randn_like(results(plain, in_float32)[0])
        self.expected = results(plain, in_float32, self.grad)

    def seconds(self, repeats: int) -> float:
        """inf where the result is wrong or the configuration is none that the kernel can have."""
        try:
            if not agrees(results(self.way, self.inputs, self.grad), self.expected, LIMITS[self.dtype]):
                return float("inf")
            run = lambda: results(self.way, self.inputs, self.grad)  # noqa: E731
            return statistics.median(seconds_of(run, self.device) for _ in range(repeats))
        except Exception as failure:
            if self.device == "cuda":
                torch.cuda.synchronize()  # raises again after an illegal access, from which on nothing runs
            print(f"  {type(failure).__name__}: {' '.join(str(failure).split())[:100]}")
            return float("inf")


def climb(table: dict, key: Any, cost: Callable[[], float], most_trials: int) -> Iterator[tuple[Any, float]]:
    """Each configuration as it is tried, with its cost, which is 1 for table[key]; leaves the best in table[key]."""
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
    """A row for each configuration tried, and one with how many were tried for the best of each key of module.CONFIGS
    that `trials` look up. A trial that fails from the start is a fault.

    family: the architecture, for keys of which "default" is the first part.
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
    parser.add_argument("--files", nargs="+", help="of kernels/, without .py; all that have configurations if unset")
    parser.add_argument("--instances", nargs="+", choices=INSTANCES, default=INSTANCES)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each configuration")
    parser.add_argument("--most", type=int, default=60, help="configurations tried for a key; 0: check the table")
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
