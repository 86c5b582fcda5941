"""The recurrence token by token: the definition in code, and what every faster form is tested against.

    S_t = (I - b_t e_t^T) D_t S_{t-1} E_t + k_t v_t^T     D_t = diag(exp(log_decay_t)), E_t of value_log_decay
    o_t = scale * S_t^T q_t                                  with a bonus u: scale * (S_{t-1} + (u * k_t) v_t^T)^T q_t

Legend: B batch, T tokens, H heads of q and k, R heads of v (a multiple of H), K key width, V value width, N documents.
"""

import torch
from torch import Tensor


def reference_recurrence(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    erase_key: Tensor | None,
    value_log_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Differentiable by autograd, any dtype, any device, one token after another; arguments as in `linear_recurrence`.

    Returns (o [B, T, R, V] in v's dtype (zeros where q is None), final state [N, R, K, V]).
    """
    batch_size, num_tokens, num_heads, value_dim = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    repeat = num_heads // k.shape[2]
    k_BTRK = k.to(dtype).repeat_interleave(repeat, 2)
    q_BTRK = None if q is None else q.to(dtype).repeat_interleave(repeat, 2)
    v_BTRV = v.to(dtype)
    write_BTRK = k_BTRK if erase_key is None else erase_key.to(dtype)  # b
    erase_BTRK = None
    if erase is not None:
        erase_BTRK = erase.to(dtype) if erase.dim() == 4 else erase.to(dtype)[..., None] * write_BTRK
    decay_BTRK = None
    if log_decay is not None:
        decay = log_decay.to(dtype).exp()
        decay = decay.expand(batch_size, num_tokens, num_heads) if decay.dim() == 1 else decay
        decay_BTRK = (decay if decay.dim() == 4 else decay[..., None]).expand(k_BTRK.shape)

    spans = [(row, 0, num_tokens) for row in range(batch_size)]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        spans = [(0, start, end) for start, end in zip(bounds, bounds[1:], strict=False)]

    rows: list[list[Tensor]] = [[] for _ in range(batch_size)]
    final_states = []
    for document, (row, start, end) in enumerate(spans):
        state_RKV = v_BTRV.new_zeros(num_heads, k.shape[-1], value_dim)
        if initial_state is not None:
            state_RKV = initial_state[document].to(dtype)
        for t in range(start, end):
            k_RK, v_RV = k_BTRK[row, t], v_BTRV[row, t]
            before_RKV = state_RKV
            if decay_BTRK is not None:
                state_RKV = decay_BTRK[row, t][..., None] * state_RKV
            if value_log_decay is not None:
                state_RKV = state_RKV * value_log_decay[row, t].to(dtype).exp()[:, None, :]
            if erase_BTRK is not None:
                erased_RV = torch.einsum("rk,rkv->rv", erase_BTRK[row, t], state_RKV)
                state_RKV = state_RKV - write_BTRK[row, t][..., None] * erased_RV[:, None, :]
            state_RKV = state_RKV + k_RK[..., None] * v_RV[:, None, :]
            if q_BTRK is None:
                continue
            read_RKV = state_RKV
            if bonus is not None:
                read_RKV = before_RKV + (bonus.to(dtype) * k_RK)[..., None] * v_RV[:, None, :]
            rows[row].append(scale * torch.einsum("rk,rkv->rv", q_BTRK[row, t], read_RKV))
        final_states.append(state_RKV)
    if q is None or num_tokens == 0:
        o = torch.zeros_like(v)
    else:
        o = torch.stack([torch.stack(row) for row in rows]).to(v.dtype)
    return o, torch.stack(final_states)
