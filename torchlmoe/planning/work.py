"""Counts what operations compute and move: FLOPs by the formulas of torch and of our operations, and bytes."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_LOW = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Task:
    """An operation's use of a device.

    dtype: in which it multiplies. num_bytes: that it reads and writes. is_product: a matrix product, or else an
        operation with FLOPs of another kind, such as a recurrence.
    """

    flops: int
    num_bytes: int
    dtype: torch.dtype
    is_product: bool


class Work:
    """tasks: by phase of the step, how often each of its tasks is done."""

    def __init__(self) -> None:
        self.tasks: dict[Hashable, Counter[Task]] = {}

    def see(
        self,
        phase: Hashable,
        operation: torch._ops.OpOverload,
        arguments: Sequence[Any],
        options: Mapping[str, Any],
        result: Any,
    ) -> None:
        """Counts an operation, if it computes or moves anything."""
        if operation.is_view or operation.namespace in ("c10d", "_c10d_functional", "prim"):
            return
        name = operation._schema.name
        given = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in _FREE or not (given or made):
            return
        flops = 0
        if (formula := flop_registry.get(operation.overloadpacket)) is not None:
            flops = formula(*arguments, **options, out_val=result)
        num_bytes = sum(x.numel() * x.element_size() for x in (*given, *made))
        dtype = next((x.dtype for x in given if x.dtype in _LOW), None)
        dtype = dtype or next((x.dtype for x in (*given, *made) if x.dtype.is_floating_point), torch.float32)
        task = Task(int(flops), num_bytes, dtype, not name.startswith("torchlmoe::") or "grouped" in name)
        self.tasks.setdefault(phase, Counter())[task] += 1


# They allocate, or read only sizes.
_FREE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
_FREE |= {"aten::lift_fresh", "aten::_unsafe_view", "aten::_local_scalar_dense"}
