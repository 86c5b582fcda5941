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

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlmoe.ops.checks import num_documents
from torchlmoe.ops.chunk_layout import ChunkLayout, Slab, chunk_layouts, restore_order
from torchlmoe.ops.vjp import vjp

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
            x_HVMC = _cut(slab, v, state)
            starts_HVMK, state = _scan(slab, *_write(slab, state.dtype, x_HVMC, k, log_decay), state)
            if q is not None:
                _paste(slab, _read(x_HVMC, starts_HVMK, k, log_decay, q), o)
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
    grad_q = None if q is None else torch.zeros_like(q)
    grad_k, grad_log_decay, of_states = torch.zeros_like(k), torch.zeros_like(log_decay), []
    layouts = _layouts(v, cu_seqlens)
    grad_v = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for layout in layouts:
        state = state_NHKV.index_select(0, layout.order_N)
        of_state = grad_final.to(state.dtype).index_select(0, layout.order_N)
        for slab in layout.slabs:
            x_HVMC = _cut(slab, v, state)
            (added, decay), of_write = vjp(partial(_write, slab, state.dtype), x_HVMC, k, log_decay)
            starts, _ = _scan(slab, added, decay, state)
            of_x, of_starts = torch.zeros_like(x_HVMC), torch.zeros_like(starts)
            if q is not None:
                of_read = vjp(_read, x_HVMC, starts, k, log_decay, q)[1](_cut(slab, grad_o, state))
                of_x, of_starts, *of_constants = of_read
                for total, x in zip((grad_k, grad_log_decay, grad_q), of_constants, strict=True):
                    total += x
            of_added, of_state = _scan_back(slab, decay, of_starts, of_state)
            written_x, *of_constants = of_write((of_added, torch.conj_physical(starts) * of_added))
            for total, x in zip((grad_k, grad_log_decay), of_constants, strict=True):
                total += x
            _paste(slab, of_x + written_x, grad_v)
        of_states.append(of_state)
    grad_state = restore_order(layouts, torch.cat(of_states))
    return grad_q, grad_k, grad_v, grad_log_decay, grad_state


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


def _powers(log_decay: Tensor, dtype: torch.dtype, chunk_size: int) -> tuple[Tensor, Tensor]:
    """exp(n G) for n below the chunk size, [H, V, C, K] in `dtype`, and for n = 1 and the chunk size, [H, V, 2, K]."""
    once = log_decay.to(torch.promote_types(log_decay.dtype, torch.float64)).exp().mT[:, :, None]
    powers, power = torch.ones_like(once, dtype=dtype), once
    while powers.shape[2] < chunk_size:
        powers = torch.cat([powers, powers * power.to(dtype)], 2)
        power = power * power
    return powers, torch.cat([once, power], 2).to(dtype)


def _write(slab: Slab, dtype: torch.dtype, x_HVMC: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk adds to the state, and the state's decay over it, [H, V, M, K]; differentiable."""
    chunk_size = x_HVMC.shape[-1]
    powers_HVCK, ends = _powers(log_decay, dtype, chunk_size)
    written, decay_HVMK = x_HVMC, ends[:, :, 1:]
    if slab.padded_MC is not None:
        length_M = chunk_size - slab.padded_MC.sum(1)
        source_MC = torch.arange(chunk_size, device=x_HVMC.device) - (chunk_size - length_M)[:, None]
        written = x_HVMC.gather(-1, source_MC.clamp_min(0).expand_as(x_HVMC)) * (source_MC >= 0)
        decay_HVMK = torch.cat([powers_HVCK, decay_HVMK], 2)[:, :, length_M]
    added_HVMK = written.flip(-1) @ _real(powers_HVCK)
    if dtype.is_complex:
        added_HVMK = torch.complex(*added_HVMK.chunk(2, -1))
    added_HVMK = added_HVMK * k.to(dtype)[:, None, None]
    return added_HVMK, decay_HVMK.expand_as(added_HVMK)


def _read(x_HVMC: Tensor, starts_HVMK: Tensor, k: Tensor, log_decay: Tensor, q: Tensor) -> Tensor:
    """o [H, V, M, C]; differentiable. starts: the states at the start of each chunk."""
    dtype, chunk_size = starts_HVMK.dtype, x_HVMC.shape[-1]
    powers_HVCK, ends = _powers(log_decay, dtype, chunk_size)
    powers, q_H11K = _real(powers_HVCK), q.to(dtype)[:, None, None]
    # Re(z w) is the product of (Re z, Im z) and (Re w, -Im w).
    taps_HVC = (powers @ _real(q_H11K * k.to(dtype)[:, None, None], -1).mT)[..., 0]
    toeplitz = F.pad(taps_HVC, (chunk_size - 1, 0)).unfold(-1, chunk_size, 1).flip(-1)
    before = starts_HVMK * (q_H11K * ends[:, :, :1])
    return x_HVMC @ toeplitz.mT + _real(before, -1) @ powers.mT


def _scan(slab: Slab, added_HVMK: Tensor, decay_HVMK: Tensor, state_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """The states at the start of each chunk, [H, V, M, K], and after each document, longest first."""
    state, starts, finished = state_NHKV.permute(1, 3, 0, 2), [], []
    for added, decay in _by_step(slab, added_HVMK, decay_HVMK):
        starts.append(state[:, :, : added.shape[2]])
        finished.append(state[:, :, added.shape[2] :])
        state = torch.addcmul(added, decay, starts[-1])
    return torch.cat(starts, 2), torch.cat([state, *reversed(finished)], 2).permute(2, 0, 3, 1)


def _scan_back(slab: Slab, decay_HVMK: Tensor, of_starts_HVMK: Tensor, of_final_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what each chunk adds, and of the state before the slab, from those of the results of `_scan`."""
    of_final = of_final_NHKV.permute(1, 3, 0, 2)
    of_state, of_added = of_final[:, :, :0], []
    for decay, of_start in reversed(_by_step(slab, torch.conj_physical(decay_HVMK), of_starts_HVMK)):
        if of_state.shape[2] < decay.shape[2]:  # documents that end here
            of_state = torch.cat([of_state, of_final[:, :, of_state.shape[2] : decay.shape[2]]], 2)
        of_added.append(of_state)
        of_state = torch.addcmul(of_start, decay, of_state)
    of_state = torch.cat([of_state, of_final[:, :, of_state.shape[2] :]], 2)
    return torch.cat(of_added[::-1], 2), of_state.permute(2, 0, 3, 1)


def _by_step(slab: Slab, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The chunks [H, V, M, K] of each step of the scan."""
    return list(zip(*(x.split(slab.num_active, 2) for x in tensors), strict=True))
