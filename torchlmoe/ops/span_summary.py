"""The effect of a span of tokens on the incoming state: the linear recurrence is an affine map of it."""

import torch
from torch import Tensor

from torchlmoe.ops.checks import num_documents
from torchlmoe.ops.linear_recurrence import check_terms, run_terms
from torchlmoe.ops.operation import operation

PIECE_LENGTH = 128  # tokens whose log decays are summed one after another


@operation
def span_summary(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase: Tensor | None = None,
    erase_key: Tensor | None = None,
    value_log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """Return the affine map of a span of tokens (or of each packed document); arguments as in `linear_recurrence`.

    Returns the transition and the state [N, R, K, V], in at least float32 and differentiable. The transition is
        [N, R, K], a diagonal, without an erase term:       S_out = transition[..., None] * S_in + state;
        [N, R, K, K] with one:                              S_out = transition @ S_in + state;
        a pair of diagonals [N, R, K] and [N, R, V] with a decay on the value side, K + V numbers per head:
                                                            S_out = key[..., None] * S_in * value[..., None, :] + state.
    """
    check_terms(k, k, v, log_decay, erase, erase_key, value_log_decay, None, None, cu_seqlens)
    num_heads, key_dim, value_dim = v.shape[2], k.shape[-1], v.shape[-1]
    if erase is None:
        _, state = run_terms(None, k, v, log_decay, None, None, value_log_decay, None, 1.0, None, cu_seqlens, backend)
        transition = _total_decay(log_decay, v, key_dim, cu_seqlens)
        if value_log_decay is None:
            return transition, state
        return (transition, _total_decay(value_log_decay, v, value_dim, cu_seqlens)), state
    # The columns of the state do not mix, so the transition is computed as K more columns that start from the identity.
    documents, dtype = num_documents(v, cu_seqlens), torch.promote_types(v.dtype, torch.float32)
    identity = torch.eye(key_dim, dtype=dtype, device=v.device).expand(documents, num_heads, -1, -1)
    initial_state = torch.cat([identity.new_zeros(documents, num_heads, key_dim, value_dim), identity], -1)
    wide_v = torch.nn.functional.pad(v, (0, key_dim))
    _, state = run_terms(
        None, k, wide_v, log_decay, erase, erase_key, None, None, 1.0, initial_state, cu_seqlens, backend
    )
    return state[..., value_dim:], state[..., :value_dim]


def _total_decay(log_decay: Tensor | None, v: Tensor, width: int, cu_seqlens: Tensor | None) -> Tensor:
    """exp of each document's summed log decay, [N, R, width]."""
    batch_size, length, num_heads, _ = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    if log_decay is None:
        return v.new_ones(num_documents(v, cu_seqlens), num_heads, width, dtype=dtype)
    decay = log_decay.to(dtype)
    decay = decay.expand(batch_size, length, num_heads) if decay.dim() == 1 else decay
    total = decay.sum(1) if cu_seqlens is None else _sum_documents(decay[0], cu_seqlens)
    return (total if total.dim() == 3 else total[..., None]).expand(-1, -1, width).exp()


def _sum_documents(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [T, ...] -> [N, ...], always in the same order, and the bounds stay on their device.

    `segment_reduce` computes a sum in one thread, token by token, so documents are cut into short pieces.
    """
    starts = torch.arange(0, len(x), PIECE_LENGTH, device=x.device, dtype=cu_seqlens.dtype)
    bounds = torch.cat([cu_seqlens, starts]).sort().values
    pieces = torch.segment_reduce(x, "sum", offsets=bounds, unsafe=True)
    return torch.segment_reduce(pieces, "sum", offsets=torch.searchsorted(bounds, cu_seqlens), unsafe=True)
