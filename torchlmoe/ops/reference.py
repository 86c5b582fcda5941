"""The recurrence token by token: the definition in code. Every faster form is tested against it.

    S_t = (I - erase_key_t erase_t^T) diag(exp(log_decay_t)) S_{t-1} diag(exp(value_log_decay_t)) + k_t v_t^T
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
    """Run token by token, differentiable by autograd, in any dtype; arguments as in `linear_recurrence`.

    Returns (o [B, T, R, V] in v's dtype (zeros if q is None), final state [N, R, K, V]).
    """
    batch_size, num_tokens, num_heads, value_dim = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    repeat = num_heads // k.shape[2]
    k_BTRK = k.to(dtype).repeat_interleave(repeat, 2)
    q_BTRK = None if q is None else q.to(dtype).repeat_interleave(repeat, 2)
    v_BTRV = v.to(dtype)
    write_BTRK = k_BTRK if erase_key is None else erase_key.to(dtype)
    erase_BTRK = None
    if erase is not None:
        erase_BTRK = erase.to(dtype) if erase.dim() == 4 else erase.to(dtype)[..., None] * write_BTRK
    decay_BTRK = None
    if log_decay is not None:
        decay = log_decay.to(dtype).exp()
        decay = decay.expand(batch_size, num_tokens, num_heads) if decay.dim() == 1 else decay
        decay_BTRK = (decay if decay.dim() == 4 else decay[..., None]).expand(k_BTRK.shape)

    bounds = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()  # packed documents share the only row
    num_states = batch_size if cu_seqlens is None else 1
    first_states_NRKV = v_BTRV.new_zeros((len(bounds) - 1) * num_states, num_heads, k.shape[-1], value_dim)
    if initial_state is not None:
        first_states_NRKV = initial_state.to(dtype)
    outputs, final_states = [], [first_states_NRKV[:0]]
    for document, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state_BRKV = first_states_NRKV[document : document + num_states]
        for t in range(start, end):
            k_BRK, v_BRV = k_BTRK[:, t], v_BTRV[:, t]
            before_BRKV = state_BRKV
            if decay_BTRK is not None:
                state_BRKV = decay_BTRK[:, t][..., None] * state_BRKV
            if value_log_decay is not None:
                state_BRKV = state_BRKV * value_log_decay[:, t].to(dtype).exp()[:, :, None, :]
            if erase_BTRK is not None:
                erased_BRV = torch.einsum("brk,brkv->brv", erase_BTRK[:, t], state_BRKV)
                state_BRKV = state_BRKV - write_BTRK[:, t][..., None] * erased_BRV[:, :, None, :]
            state_BRKV = state_BRKV + k_BRK[..., None] * v_BRV[:, :, None, :]
            if q_BTRK is None:
                continue
            read_BRKV = state_BRKV
            if bonus is not None:
                read_BRKV = before_BRKV + (bonus.to(dtype) * k_BRK)[..., None] * v_BRV[:, :, None, :]
            outputs.append(scale * torch.einsum("brk,brkv->brv", q_BTRK[:, t], read_BRKV))
        final_states.append(state_BRKV)
    o = torch.stack(outputs, 1).to(v.dtype) if outputs else torch.zeros_like(v)
    return o, torch.cat(final_states)
