"""The definition of the recurrence with elementwise decay."""

import torch
from torch import Tensor


def element_by_element(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    step: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [1, T, H, V] and the final states [N, H, K, V] of one row, or of the documents packed into it."""
    places = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = v.new_zeros(len(places) - 1, v.shape[2], k.shape[-1], v.shape[3])
    outputs, states = [], []
    for start, end, state in zip(places, places[1:], initial_state, strict=False):
        for t in range(start, end):
            log = log_decay[0, t] if log_decay.dim() == 5 else log_decay
            log = log if step is None else log * step[0, t][:, None]
            k_t, q_t = (x[0, t] if x.dim() == 4 else x for x in (k, q))
            state = log.exp() * state + k_t[..., None] * v[0, t][:, None]
            outputs.append((q_t[:, None] @ state)[:, 0])
        states.append(state)
    return torch.stack(outputs)[None], torch.stack(states)
