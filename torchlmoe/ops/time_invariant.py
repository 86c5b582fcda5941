"""The elementwise recurrence as matrix products, if only v varies over tokens (S4).

    o_t = sum_{n<=t} c_n v_{t-n}          c_n = Re(sum_k q_k exp(n G_k) k_k)

is a convolution. In a chunk of C tokens it is a Toeplitz matrix of C taps. Earlier tokens are summarized by the
state at the chunk's start, which is read, decayed and written by one product each: per channel C + 2 K multiply-adds
per token in matrix products, while the scan reads K complex numbers from memory. Powers of exp(G) are products in
float64, so that no phase n * G loses its digits and no exponent is positive.

A document's last chunk may be short. Reading starts at its first slot and writing ends at its last slot, so its tokens
are at the left of the chunk for reads and at the right for writes. The state decays by the actual number of tokens.

Legend: N documents, M chunks, C slots of a chunk, H heads, K key width, V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlmoe.ops.checks import num_documents
from torchlmoe.ops.chunk_layout import ChunkLayout, Slab, chunk_layouts, restore_order
from torchlmoe.ops.pull_back import pull_back

CHUNK_SIZE = 64


def time_invariant_forward(
    q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor, state_NHKV: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o like v (zero without q), and the state after every document.

    q, k: [H, K]. v: [B, T, H, V]. log_decay: [H, K, V]. state_NHKV: before every document.
    """
    layouts, final = _layouts(v, cu_seqlens), []
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for layout in layouts:
        state = state_NHKV.index_select(0, layout.order_N)
        for slab in layout.slabs:
            state, *read = _convolve(slab, k, _cut(slab, v, state), log_decay, state, q)
            for o_HVMC in read:
                _paste(slab, o_HVMC, o)
        final.append(state)
    return o, restore_order(layouts, torch.cat(final))


def time_invariant_backward(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state_NHKV: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q (None without it), k, v, log_decay and the state before."""
    constants = [k, log_decay] if q is None else [k, log_decay, q]
    of_constants = [torch.zeros_like(x) for x in constants]
    layouts, of_states = _layouts(v, cu_seqlens), []
    grad_v = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for layout in layouts:
        state = state_NHKV.index_select(0, layout.order_N)
        grad_state = grad_final.to(state.dtype).index_select(0, layout.order_N)
        for slab in layout.slabs:

            def convolve(x, state, k, log_decay, q=None, slab=slab):
                return _convolve(slab, k, x, log_decay, state, q)

            grads = (grad_state,) if q is None else (grad_state, _cut(slab, grad_o, state))
            inputs = _cut(slab, v, state), state, *constants
            grad_x, grad_state, *of_slab = pull_back(convolve, inputs, grads)
            _paste(slab, grad_x, grad_v)
            of_constants = [x + y for x, y in zip(of_constants, of_slab, strict=True)]
        of_states.append(grad_state)
    grad_k, grad_log_decay, *of_q = of_constants
    grad_state = restore_order(layouts, torch.cat(of_states))
    return of_q[0] if of_q else None, grad_k, grad_v, grad_log_decay, grad_state


def _layouts(v: Tensor, cu_seqlens: Tensor | None) -> tuple[ChunkLayout, ...]:
    """Layouts of one slab each, or of none if no document has a token."""
    bounds = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    all_chunks = max(1, v.shape[0] * v.shape[1] * num_documents(v, cu_seqlens))
    return chunk_layouts(v.shape[0], v.shape[1], bounds, CHUNK_SIZE, all_chunks, v.device)


def _cut(slab: Slab, x: Tensor, state: Tensor) -> Tensor:
    """[B, T, H, V] -> [H, V, M, C], in the real dtype of the state."""
    num_rows, chunk_size = slab.tokens_MC.shape
    chunks = slab.cut_into(x, state.real.new_empty(num_rows * x.shape[2], chunk_size, *x.shape[3:]))
    return chunks.unflatten(0, (-1, x.shape[2])).permute(1, 3, 0, 2).contiguous()


def _paste(slab: Slab, x_HVMC: Tensor, out: Tensor) -> None:
    """Write to the places in [B, T, H, V]."""
    slab.paste(x_HVMC.permute(2, 0, 3, 1).flatten(0, 1), out)


def _real(x: Tensor, sign: int = 1) -> Tensor:
    """[..., K] -> [..., 2 K], real parts and then imaginary parts times `sign`; a real x as it is."""
    return torch.cat([x.real, sign * x.imag], -1) if x.is_complex() else x


def _convolve(
    slab: Slab, k: Tensor, x_HVMC: Tensor, log_decay: Tensor, state_NHKV: Tensor, q: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The state after each document, longest first, and with q also o [H, V, M, C]; differentiable."""
    dtype, chunk_size = state_NHKV.dtype, x_HVMC.shape[-1]
    once_HV1K = log_decay.to(torch.promote_types(log_decay.dtype, torch.float64)).exp().mT[:, :, None]
    powers_HVCK, power_HV1K = torch.ones_like(once_HV1K, dtype=dtype), once_HV1K
    while powers_HVCK.shape[2] < chunk_size:
        powers_HVCK = torch.cat([powers_HVCK, powers_HVCK * power_HV1K.to(dtype)], 2)
        power_HV1K = power_HV1K * power_HV1K
    decay_HVMK, powers = power_HV1K.to(dtype), _real(powers_HVCK)

    written = x_HVMC
    if slab.padded_MC is not None:
        length_M = chunk_size - slab.padded_MC.sum(1)
        source_MC = torch.arange(chunk_size, device=x_HVMC.device) - (chunk_size - length_M)[:, None]
        written = x_HVMC.gather(-1, source_MC.clamp_min(0).expand_as(x_HVMC)) * (source_MC >= 0)
        decay_HVMK = torch.cat([powers_HVCK, decay_HVMK], 2)[:, :, length_M]
    added_HVMK = written.flip(-1) @ powers
    if dtype.is_complex:
        added_HVMK = torch.complex(*added_HVMK.chunk(2, -1))
    added_HVMK = added_HVMK * k.to(dtype)[:, None, None]

    state, starts, finished = state_NHKV.permute(1, 3, 0, 2), [], []
    by_step = zip(
        added_HVMK.split(slab.num_active, 2), decay_HVMK.expand_as(added_HVMK).split(slab.num_active, 2), strict=True
    )
    for added, decay in by_step:
        starts.append(state[:, :, : added.shape[2]])
        finished.append(state[:, :, added.shape[2] :])
        state = torch.addcmul(added, decay, starts[-1])
    final = torch.cat([state, *reversed(finished)], 2).permute(2, 0, 3, 1)
    if q is None:
        return (final,)

    # Re(z w) is the product of (Re z, Im z) and (Re w, -Im w).
    q_H11K = q.to(dtype)[:, None, None]
    taps_HVC = (powers @ _real(q_H11K * k.to(dtype)[:, None, None], -1).mT)[..., 0]
    toeplitz = F.pad(taps_HVC, (chunk_size - 1, 0)).unfold(-1, chunk_size, 1).flip(-1)
    before = torch.cat(starts, 2) * (q_H11K * once_HV1K.to(dtype))
    return final, x_HVMC @ toeplitz.mT + _real(before, -1) @ powers.mT
