"""Bytes and FLOPs of kernel launches, counted by Triton's interpreter on tensors that have shapes but no memory.

`traffic_of` runs the launcher of an operation on meta tensors of any size. Each launch then runs in the interpreter,
where a load gives zeros, a store does nothing, and products and scans compute nothing, but all are counted: of loads
and stores the elements that the mask lets through times their size, for each argument of the kernel, and 2 M N K of a
product.

Programs that differ only in their place in a long grid do the same, so of an axis with more than MOST_PROGRAMS only
those at the ends run and count for all; it is an error if they neither agree nor repeat with a period. The linear
recurrence and the convolution run on two short rows, and what they count is extended to the length of the row: every
further span of tokens costs the same.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ScanOps, TensorHandle
from triton.runtime.jit import KernelInterface

from benchmarks.operations import kernel_modules

MOST_PROGRAMS = 8  # of an axis of a grid, that all run
SHORT = {"linear_recurrence": (256, 512), "causal_conv": (64, 128)}  # lengths that take the place of longer ones
MOST_PERIOD = 16  # programs after which a grid repeats, such as a head's tiles
REGION = 1 << 48  # addresses that one tensor has for itself; real memory lies below the first
BETWEEN = "PyTorch"  # what stands for a kernel's name where the launcher calls torch, such as for a sum of parts


@dataclass
class Traffic:
    """What one kernel of an operation moves, in bytes by argument, and its FLOPs in matrix products."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    # The bytes of each argument once in each launch that uses it: what is left if a cache catches repeated reads.
    once: Counter[str] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        return self.read.total() + self.written.total()

    def add(self, other: "Traffic", times: int = 1) -> None:
        for name in ("read", "written", "once"):
            counter = getattr(self, name)
            for argument, number in getattr(other, name).items():
                counter[argument] += number * times
        self.flops += other.flops * times


Kernels = dict[str, Traffic]  # by name, with a number in front: the place in the operation


def size_in_memory(x: Tensor) -> int:
    """Bytes of x's elements, each once however often x repeats it."""
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


class Pointer:
    """Stands in for a tensor at a made-up address."""

    def __init__(self, x: Tensor, number: int):
        self.dtype, self.number = x.dtype, number

    def data_ptr(self) -> int:
        return self.number * REGION


class Count:
    """Counts what a program loads, stores and multiplies.

    extents: the bytes from the first to the last element of each tensor, by its number. It is an error to leave them.
    """

    def __init__(self, extents: dict[int, int]) -> None:
        self.extents = extents
        self.loads: Counter[int] = Counter()
        self.stores: Counter[int] = Counter()
        self.flops = 0

    def same(self, other: "Count") -> bool:
        return (self.loads, self.stores, self.flops) == (other.loads, other.stores, other.flops)

    def _add(self, counter: Counter[int], pointers: TensorHandle, mask: TensorHandle) -> int:
        """Count the elements that the mask lets through. Return whose they are; -1 if there are none."""
        inside = np.flatnonzero(mask.data)
        if not len(inside):
            return -1
        addresses, width = pointers.data.flat[inside], pointers.get_element_ty().primitive_bitwidth // 8
        lowest, highest = int(addresses.min()), int(addresses.max())
        number = lowest // REGION
        if number > 0:
            last = number * REGION + self.extents.get(number, 0) - width
            assert highest <= last, f"an access at {lowest:#x} to {highest:#x} is beyond its tensor"
        counter[number] += len(inside) * width
        return number

    def load(self, builder: InterpreterBuilder, pointers, mask, other, *options) -> TensorHandle:
        if self._add(self.loads, pointers, mask) == 0:
            return MASKED_LOAD(builder, pointers, mask, other, *options)
        dtype = pointers.get_element_ty()
        return TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(dtype)), dtype)

    def store(self, builder: InterpreterBuilder, pointers, value, mask, *options) -> None:
        self._add(self.stores, pointers, mask)

    def dot(self, builder: InterpreterBuilder, a, b, onto, *options) -> TensorHandle:
        self.flops += 2 * a.data.size * b.data.shape[-1]
        return onto


MASKED_LOAD = InterpreterBuilder.create_masked_load


@contextmanager
def counting(kernel: InterpretedFunction, count: Count) -> Iterator[None]:
    """The language is prepared once for each file, not again for each device function that the kernel calls."""
    scopes: dict[str, Any] = {}

    def prepare(function: InterpretedFunction) -> None:
        if function.fn.__module__ not in scopes:
            scopes[function.fn.__module__] = interpreter._patch_lang(function.fn)

    def call(function: InterpretedFunction, *args: Any, **named: Any) -> Any:
        prepare(function)
        return function.rewrite()(*args, **named)

    prepare(kernel)
    try:
        with (
            patch.object(InterpretedFunction, "__call__", call),
            patch.object(InterpreterBuilder, "create_masked_load", lambda *x: count.load(*x)),
            patch.object(InterpreterBuilder, "create_masked_store", lambda *x: count.store(*x)),
            patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *x: None),
            patch.object(ScanOps, "generic_scan", lambda self, inputs: list(inputs)),
            patch.object(InterpreterBuilder, "create_dot", lambda *x: count.dot(*x)),
        ):
            yield
    finally:
        for scope in reversed(scopes.values()):
            scope.restore()


def _chosen(size: int, ends: int) -> list[int]:
    """Indices of an axis that stand for all: as many at both ends."""
    return list(range(size)) if size <= max(MOST_PROGRAMS, 2 * ends) else [*range(ends), *range(size - ends, size)]


def _weights(counts: dict[tuple[int, ...], "Count"], axis: int, size: int, chosen: list[int]) -> dict[int, int] | None:
    """For how many indices of an axis each chosen one stands: those that repeat with a period, such as a head's tiles
    of values, of which the last has fewer columns. None if they do not repeat."""
    if len(chosen) == size:
        return dict.fromkeys(chosen, 1)
    for period in range(1, len(chosen) // 2 + 1):
        if size % period == 0 and all(
            count.same(counts[(*place[:axis], place[axis] % period, *place[axis + 1 :])])
            for place, count in counts.items()
        ):
            return {index: size // period if index < period else 0 for index in chosen}
    return None


def count_launch(kernel: InterpretedFunction, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> Traffic:
    """What one launch moves. Raises AssertionError if programs that should do the same do not."""
    function = kernel.rewrite()
    names, sizes, extents, kept = {0: "tables"}, {0: 0}, {}, []

    def pointer(path: str, x: Any) -> Any:
        if isinstance(x, tuple):
            fields = getattr(x, "_fields", None) or [str(i) for i in range(len(x))]
            held = [pointer(path if name == "pointer" else name, y) for name, y in zip(fields, x, strict=True)]
            return type(x)(*held) if hasattr(x, "_fields") else tuple(held)
        if not isinstance(x, Tensor):
            return x
        if x.device.type != "meta":  # a table of where chunks lie: it is read
            sizes[0] += size_in_memory(x)
            kept.append(x)
            return x
        number = len(names)
        names[number], sizes[number] = path, size_in_memory(x)
        furthest = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        extents[number] = (furthest + 1) * x.element_size() if x.numel() else 0
        return Pointer(x, number)

    spec = inspect.getfullargspec(kernel.fn)
    given = inspect.getcallargs(kernel.fn, *args, **{k: v for k, v in options.items() if k in spec.args})
    constexprs = [name for name, kind in spec.annotations.items() if "constexpr" in str(kind)]
    values = {
        name: value if name in constexprs else interpreter._implicit_cvt(pointer(name, value))
        for name, value in given.items()
    }
    grid = (*grid, 1, 1)[:3]
    interpreter.interpreter_builder.set_grid_dim(*grid)
    ends = [1, 1, 1]
    for _ in range(2):
        axes = [_chosen(size, at_each) for size, at_each in zip(grid, ends, strict=True)]
        counts = {place: Count(extents) for place in product(*axes)}
        for place, count in counts.items():
            interpreter.interpreter_builder.set_grid_idx(*place)
            with counting(kernel, count):
                function(**values)
        weights = [_weights(counts, axis, size, axes[axis]) for axis, size in enumerate(grid)]
        if None not in weights:
            break
        ends = [MOST_PERIOD if weight is None else 1 for weight in weights]
    traffic = Traffic()
    for place, count in counts.items():
        programs = 1
        for weight, index in zip(weights, place, strict=True):
            assert weight is not None, f"programs of {kernel.__name__} on {grid} do not repeat"
            programs *= weight[index]
        for number, amount in count.loads.items():
            traffic.read[names[number]] += amount * programs
        for number, amount in count.stores.items():
            traffic.written[names[number]] += amount * programs
        traffic.flops += count.flops * programs
    for number, name in names.items():
        for counter in (traffic.read, traffic.written):
            if name in counter:
                traffic.once[name] += min(counter[name], sizes[number])
    return traffic


class Between(TorchDispatchMode):
    """Counts what torch's own operations read and write, but for those that make no pass over memory."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = [x.alias_info for x in function._schema.returns]
        is_view = any(x is not None and not x.is_write for x in aliases)
        if not is_view and not function._schema.name.removeprefix("aten::").startswith(("empty", "new_empty", "lift")):
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    self.traffic.read["inputs"] += size_in_memory(x)
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self.traffic.written["outputs"] += size_in_memory(x)
            self.traffic.once = self.traffic.read + self.traffic.written
        return result


@contextmanager
def machine(name: str) -> Iterator[None]:
    """Kernels have the configurations that they have on this machine."""
    chosen = {module: module.architecture for module in kernel_modules() if hasattr(module, "architecture")}
    for module in chosen:
        module.architecture = lambda x: name
    try:
        yield
    finally:
        for module, architecture in chosen.items():
            module.architecture = architecture


@contextmanager
def counted_launches() -> Iterator[Kernels]:
    """Launches are counted and do not run; what they move, by kernel."""
    kernels: Kernels = {}

    def launcher(kernel: InterpretedFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            name = kernel.__name__.strip("_").removesuffix("_kernel")
            traffic = count_launch(kernel, grid if isinstance(grid, tuple) else (grid,), args, options)
            kernels[f"{len(kernels) + 1} {name}"] = traffic

        return launch

    elementwise = next(module for module in kernel_modules() if module.__name__.endswith(".elementwise_recurrence"))
    cut = elementwise._cut

    def cut_on_host(v: Tensor, cu_seqlens: Tensor | None, *sizes: int) -> Any:
        return cut(torch.empty(v.shape[:2]), cu_seqlens, *sizes)

    with (
        patch.object(KernelInterface, "__getitem__", launcher),
        patch.object(elementwise, "_cut", cut_on_host),
        Between() as between,
    ):
        yield kernels
    if between.traffic.bytes:
        kernels[f"{len(kernels) + 1} {BETWEEN}"] = between.traffic


def _launched(name: str, args: tuple) -> Kernels:
    definition = torch._library.custom_ops.OPDEFS[name]
    with counted_launches() as kernels:
        definition._init_fn(*args)
    return kernels


def traffic_of(name: str, args: tuple) -> Kernels:
    """What an operation's kernels move: of "torchlmoe::...", with its arguments on the meta device."""
    lengths = next((lengths for start, lengths in SHORT.items() if name.startswith(f"torchlmoe::{start}_triton")), None)
    length = max((x.shape[1] for x in args if isinstance(x, Tensor) and x.dim() > 2), default=0)
    if lengths is None or length <= lengths[1]:
        return _launched(name, args)

    def shortened(to: int) -> tuple:
        def cut(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() <= 2 or x.shape[1] != length:
                return x
            # Rows that follow one another still do, since a launcher may copy others.
            row = x.stride(0) // length * to if x.stride(0) == length * x.stride(1) else x.stride(0)
            strides = (row, *x.stride()[1:])
            return torch.empty_strided((len(x), to, *x.shape[2:]), strides, dtype=x.dtype, device=x.device)

        return tree_map(cut, args)

    short, longer = (_launched(name, shortened(to)) for to in lengths)
    assert short.keys() == longer.keys()
    assert (length - lengths[0]) % (lengths[1] - lengths[0]) == 0, f"{length} tokens are not whole spans"
    times = (length - lengths[0]) // (lengths[1] - lengths[0])
    for kernel, traffic in short.items():
        rest = Traffic()
        rest.add(longer[kernel])
        rest.add(traffic, -1)
        traffic.add(rest, times)
    return short
