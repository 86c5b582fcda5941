"""The recurrence as it is defined, for checks of what computes it otherwise."""

import torch
from torch import Tensor


def token_by_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase: Tensor | None = None,
    erase_key: Tensor | None = None,
    value_log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, R, V] and the final states [N, R, K, V], of rows or packed documents; q, k and v have R heads."""
    num_rows, length, num_heads, _ = v.shape
    places = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    documents = [(row, *pair) for row in range(num_rows) for pair in zip(places, places[1:], strict=False)]
    first = v.new_zeros(len(documents), num_heads, k.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    log_decay = log_decay.expand(v.shape[:3]) if log_decay is not None and log_decay.dim() == 1 else log_decay
    outputs: list[list[Tensor]] = [[] for _ in range(num_rows)]
    states = []
    for (row, start, end), state in zip(documents, first, strict=True):
        for t in range(start, end):
            before, k_t, v_t = state, k[row, t], v[row, t][:, None]
            b = k_t if erase_key is None else erase_key[row, t]
            if log_decay is not None:
                state = log_decay[row, t].exp().view(num_heads, -1, 1) * state
            if value_log_decay is not None:
                state = state * value_log_decay[row, t].exp()[:, None]
            if erase is not None:
                e = erase[row, t] if erase.dim() == 4 else erase[row, t][:, None] * b
                state = state - b[..., None] * (e[:, None] @ state)
            state = state + k_t[..., None] * v_t
            read = state if bonus is None else before + (bonus * k_t)[..., None] * v_t
            outputs[row].append(scale * (q[row, t][:, None] @ read)[:, 0])
        states.append(state)
    return torch.stack([torch.stack(row) for row in outputs]), torch.stack(states)
