"""Counts the FLOPs of operations, by the formulas that torch and torchlmoe register, and the bytes they move."""

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
    """One operation's use of a device.

    num_bytes: read and written. dtype: of its multiplications. is_product: True for matrix products and operations
    without FLOPs, False for others, such as a recurrence.
    """

    flops: int
    num_bytes: int
    dtype: torch.dtype
    is_product: bool


class Work:
    """Counts tasks. tasks: by phase of the step, how often each task runs."""

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
        """Count an operation, unless it neither computes nor moves anything."""
        if operation.is_view or operation.namespace in ("c10d", "_c10d_functional", "prim"):
            return
        name = operation._schema.name
        inputs = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in _FREE or not (inputs or outputs):
            return
        flops = 0
        if (formula := flop_registry.get(operation.overloadpacket)) is not None:
            flops = formula(*arguments, **options, out_val=result)
        num_bytes = sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        dtype = next((x.dtype for x in inputs if x.dtype in _LOW), None)
        dtype = dtype or next((x.dtype for x in (*inputs, *outputs) if x.dtype.is_floating_point), torch.float32)
        task = Task(int(flops), num_bytes, dtype, not name.startswith("torchlmoe::") or "grouped" in name)
        self.tasks.setdefault(phase, Counter())[task] += 1


# Operations that only allocate, or only read sizes.
_FREE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
_FREE |= {"aten::lift_fresh", "aten::_unsafe_view", "aten::_local_scalar_dense"}
