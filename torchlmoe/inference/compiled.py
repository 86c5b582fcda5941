"""Compiles a decoding step, with small custom operations replaced by plain torch.

On a CPU, calling a custom operation takes longer than its work on one token. Without derivatives some of them are a few
lines of plain torch, which the compiler fuses with the code around them. On a GPU they are kernels and are not
replaced.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torchlmoe.ops.causal_conv
import torchlmoe.ops.grouped_matmul
import torchlmoe.ops.weighted_swiglu
import torchlmoe.routing.dispatch
import torchlmoe.routing.router  # noqa: F401  (these define the operations)

# Smallest part of a loop that a CPU thread runs. A step's loops are short: with Inductor's default of 512, threads
# share every loop and wait for each other after it, which on a busy machine takes longer than the work.
MIN_ELEMENTS_PER_THREAD = 2**14


def compile_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function`, compiled at its first call: once for all positions, and again for other numbers of rows."""
    return torch.compile(function, backend=backend)


def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor with the replacements of `opened`. One function of the module: another backend object recompiles."""
    from torch._inductor.compile_fx import compile_fx  # imported here, since only this function needs Inductor
    from torch._inductor.decomposition import select_decomp_table

    _allow_closed()
    return compile_fx(  # type: ignore[return-value]
        graph,  # type: ignore[arg-type]
        inputs,
        config_patches={"cpp.min_chunk_size": MIN_ELEMENTS_PER_THREAD},
        decompositions={**select_decomp_table(), **opened()},
    )


def _allow_closed() -> None:
    """Registers fallbacks, so that Inductor calls a custom operation if its plain form returns NotImplemented."""
    from torch._inductor.graph import get_layout_constraint_tag, tag_to_layout_constraint
    from torch._inductor.lowering import lowerings, make_fallback

    for operation in opened():
        if operation not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(operation, with_default=True))
            make_fallback(operation, constraint, warn=False, override_decomp=True)


def opened() -> dict[Any, Callable[..., Any]]:
    """Custom operation -> its form in plain torch. If that returns NotImplemented, the operation is not replaced."""
    operations = torch.ops.torchlmoe
    return {
        operations.causal_conv.default: _causal_conv,
        operations.weighted_swiglu.default: _weighted_swiglu,
        operations.grouped_matmul.default: _grouped_matmul,
        operations.top_indices.default: _top_indices,
        operations.sort_slots.default: _sort_slots,
        operations.gather_slots.default: _gather_slots,
        operations.sum_slots.default: _sum_slots,
    }


def _on_cpu(form: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, *others: Any) -> Any:
        return form(x, *others) if x.device.type == "cpu" else NotImplemented

    return run


@_on_cpu
def _causal_conv(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, activation: bool) -> Any:
    if cu_seqlens is not None:
        return NotImplemented
    wide, width = x.to(_at_least_float32(x)), weight.shape[1]
    total = wide * weight[:, width - 1].to(wide.dtype)
    for shift in range(1, min(width, x.shape[1])):
        earlier = F.pad(wide[:, :-shift], (0, 0, shift, 0))
        total = total + earlier * weight[:, width - 1 - shift].to(wide.dtype)
    if not activation:
        return total.to(x.dtype), x.new_empty(0)
    return F.silu(total).to(x.dtype), total.to(x.dtype)


@_on_cpu
def _weighted_swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, weight.dtype)).chunk(2, -1)
    return (F.silu(gate) * up * weight[:, None]).to(gate_up.dtype)


@_on_cpu
def _grouped_matmul(x_MD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> Any:
    """With at most as many rows as experts, one product per row: a loop over groups would visit every expert."""
    num_rows = x_MD.shape[0]
    if type(num_rows) is not int or num_rows > weight_EFD.shape[0]:
        return NotImplemented
    rows = torch.arange(num_rows, dtype=offsets_E.dtype, device=x_MD.device)
    weight_MFD = weight_EFD[torch.searchsorted(offsets_E, rows, right=True)]
    dtype = _at_least_float32(x_MD)
    return torch.bmm(weight_MFD.to(dtype), x_MD.to(dtype)[..., None])[..., 0].to(x_MD.dtype)


@_on_cpu
def _top_indices(score: Tensor, k: int) -> Tensor:
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


@_on_cpu
def _sort_slots(expert_TK: Tensor, num_experts: int, alignment: int) -> Any:
    if alignment > 1:  # the number of slots then depends on the choices
        return NotImplemented
    expert_M, choice_M = expert_TK.flatten().sort(stable=True)
    end_E = torch.searchsorted(expert_M, torch.arange(num_experts, device=expert_M.device), right=True)
    places = torch.arange(choice_M.shape[0], device=choice_M.device)
    slot_TK = torch.empty_like(choice_M).scatter(0, choice_M, places).view(expert_TK.shape)
    return choice_M, slot_TK, end_E.int(), torch.ones(0, dtype=torch.bool, device=expert_M.device)


@_on_cpu
def _gather_slots(x_TD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
    return x_TD.index_select(0, token_M)


@_on_cpu
def _sum_slots(x_MD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
    return x_MD[slot_TK].sum(1, dtype=_at_least_float32(x_MD)).to(x_MD.dtype)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
