"""The one recurrence behind every linear sequence model: checks, choice of backend, registration with torch.

    S_t = (I - erase_key_t erase_t^T) diag(exp g_t) S_{t-1} diag(exp h_t) + k_t v_t^T          o_t = scale * S_t^T q_t

`linear_recurrence` is one operation to torch (forward and backward are a `torch.library.custom_op` pair), so that
compile, recompute and FLOP counters see it whole. docs/notation.md lists the symbols.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchlmoe.ops.checks import check_bounds, check_bounds_at_hand, check_not_empty, check_shape, num_documents
from torchlmoe.ops.chunked import Terms, chunked_forward, layouts_of, num_kept
from torchlmoe.ops.chunked_backward import chunked_backward
from torchlmoe.ops.kernel_backend import kernels_serve, within_reach
from torchlmoe.ops.operation import custom_op, gradients_of, keep_for_backward, operation, size_by_documents
from torchlmoe.ops.reference import reference_recurrence

Backend = Literal["auto", "reference", "chunked", "triton"]
KERNEL_WIDTH = 256  # the widest key that the Triton kernels support


@operation
def linear_recurrence(
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
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Read and write a K x V state per head and document, one token after another.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, R, V], R a multiple of H; head j of v reads head j // (R / H) of q and k.
        log_decay: g, natural logarithm, <= 0: None, [R], [B, T, R] or [B, T, R, K].
        erase: [B, T, R, K], or [B, T, R], the delta rule's beta: then `erase` is beta * erase_key.
        erase_key: [B, T, R, K], the key at which the state is erased; k unless given.
        value_log_decay: h, [B, T, R, V], <= 0: decay on the value side; not together with `erase`.
        bonus: u, [R, K]; o_t reads S_{t-1} + (u * k_t) v_t^T, with S_{t-1} before its decay; not together with `erase`.
        scale: multiplies o.
        initial_state: [N, R, K, V] in at least float32; N = B, or the number of packed documents. Zero unless given.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int32 [N + 1], bounds of documents packed into one row (B = 1) from 0 to T; empty ones allowed.
        backend: "reference" (token by token), "chunked" (plain PyTorch), "triton" (kernels/linear_recurrence.py: K up
            to 256, not in float64, on a GPU or with TRITON_INTERPRET=1; the GPU itself asserts bounds) or "auto":
            triton on a GPU if it supports the arguments, else chunked, or reference for a single token.

    Returns:
        o [B, T, R, V] in v's dtype, and the final state [N, R, K, V] in float32 (float64 for float64 input) or None.

    A NaN or an infinity also reaches up to 63 earlier tokens of its document, those of its chunk, through products with
    zero. With "reference" it reaches only later tokens. It never reaches another document.

    Raises:
        ValueError: shapes, dtypes or terms that do not fit together, or that the backend does not support.
    """
    check_terms(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, initial_state, cu_seqlens)
    o, final_state = run_terms(
        q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, cu_seqlens, backend
    )
    return o, (final_state if output_final_state else None)


def recurrence_flops_per_token(
    num_heads: int, key_dim: int, value_dim: int, *, decay: bool = False, erase: bool = False
) -> int:
    """Forward FLOPs per token of the definition, token by token (a multiply-add is two), for all heads.

    The chunked form needs more, but MFU counts these.
    """
    per_element = 4 + decay + 4 * erase  # write and read; decay; read with erase and subtract
    return num_heads * key_dim * value_dim * per_element


def check_terms(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, initial_state, cu_seqlens) -> None:
    if v.dim() != 4 or k.dim() != 4:
        raise ValueError(f"k and v must be [B, T, heads, width]; got {list(k.shape)} and {list(v.shape)}.")
    if not v.dtype.is_floating_point:
        raise ValueError(f"v has dtype {v.dtype}; linear_recurrence takes floating-point tensors.")
    check_not_empty(k, v)
    batch_size, length, num_heads, value_dim = v.shape
    num_key_heads, key_dim = k.shape[2:]
    check_shape("q", q, tuple(k.shape))
    check_shape("k", k, (batch_size, length, num_key_heads, key_dim))
    if num_heads % num_key_heads:
        raise ValueError(f"v has {num_heads} heads, which is not a multiple of the {num_key_heads} heads of k.")
    per_token = (batch_size, length, num_heads)
    check_shape("log_decay", log_decay, (num_heads,), per_token, (*per_token, key_dim))
    check_shape("erase", erase, per_token, (*per_token, key_dim))
    check_shape("erase_key", erase_key, (*per_token, key_dim))
    check_shape("value_log_decay", value_log_decay, (*per_token, value_dim))
    check_shape("bonus", bonus, (num_heads, key_dim))
    if erase_key is not None and erase is None:
        raise ValueError("erase_key has no effect without erase; give both, or leave erase_key out.")
    if erase is not None and (value_log_decay is not None or bonus is not None):
        other = "bonus" if bonus is not None else "value_log_decay"
        raise ValueError(f"{other} cannot be combined with erase; give one of the two.")
    check_shape("initial_state", initial_state, (num_documents(v, cu_seqlens), num_heads, key_dim, value_dim))


def run_terms(
    q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, cu_seqlens, backend
) -> tuple[Tensor, Tensor]:
    terms = (q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, cu_seqlens)
    if backend not in ("auto", "reference", "chunked", "triton"):
        raise ValueError(f"backend = {backend!r} is unknown; use 'auto', 'chunked', 'triton' or 'reference'.")
    for_kernels = terms
    if log_decay is not None and log_decay.dim() == 1 and v.dtype != torch.float64:  # constants of a layer, in float64
        for_kernels = (q, k, v, log_decay.to(torch.float32), *terms[4:])
    key_dim, tensors = k.shape[-1], [x for x in for_kernels if isinstance(x, Tensor)]
    too_wide = f"its keys are {key_dim} wide, more than {KERNEL_WIDTH}" if key_dim > KERNEL_WIDTH else None
    if kernels_serve(backend, *tensors, refusal=too_wide):
        # Imported late: on import Triton decides whether to interpret kernels.
        from torchlmoe.kernels import linear_recurrence_backward as kernels

        check_bounds_at_hand(cu_seqlens, v.shape[1])
        return kernels.linear_recurrence(*map(within_reach, for_kernels))
    decodes = backend == "auto" and v.shape[1] == 1  # one step of the definition is the fastest
    if (backend == "reference" or decodes) and v.shape[0] and v.shape[1]:
        if cu_seqlens is not None:  # chunked checks them when it lays out chunks
            check_bounds(cu_seqlens.tolist(), v.shape[1])
        return reference_recurrence(*terms)
    return _forward(*terms)[:2]


@custom_op("torchlmoe::linear_recurrence")
def _forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, the final state, and the states kept for the backward (see `chunked_forward`)."""
    terms = Terms(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale)
    return chunked_forward(terms, initial_state, layouts_of(v, cu_seqlens))


@_forward.register_fake
def _(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, cu_seqlens):
    documents, num_heads, key_dim, value_dim = num_documents(v, cu_seqlens), v.shape[2], k.shape[-1], v.shape[-1]
    state = v.new_empty(documents, num_heads, key_dim, value_dim, dtype=torch.promote_types(v.dtype, torch.float32))
    num_rows = size_by_documents(lambda bounds: num_kept(v, bounds), v, cu_seqlens)
    kept = state.new_empty(num_rows, key_dim, value_dim)
    return torch.empty_like(v, memory_format=torch.contiguous_format), state, kept


@custom_op("torchlmoe::linear_recurrence_backward")
def _backward(
    grad_o: Tensor,
    grad_final: Tensor,
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
    kept: Tensor,
) -> list[Tensor]:
    """Gradients of all tensors except cu_seqlens, in order; empty for an absent tensor: an op cannot return None."""
    terms = Terms(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale)
    grads = chunked_backward(grad_o, grad_final, terms, initial_state, layouts_of(v, cu_seqlens), kept)
    return [k.new_empty(0) if grad is None else grad for grad in grads]


@_backward.register_fake
def _(grad_o, grad_final, q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, *rest):
    return [
        k.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, initial_state)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *terms, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*terms, initial_state, cu_seqlens, output[2])
    keep_for_backward(ctx, output[:2], output[2])


def _autograd(ctx, *grads_of_outputs):
    grad_o, grad_final = gradients_of(ctx, grads_of_outputs)
    *terms, initial_state, cu_seqlens, kept = ctx.saved_tensors
    grads = _backward(grad_o, grad_final, *terms, ctx.scale, initial_state, cu_seqlens, kept)
    *of_terms, of_state = [None if x is None else grad for x, grad in zip((*terms, initial_state), grads, strict=True)]
    return (*of_terms, None, of_state, None)


torch.library.register_autograd("torchlmoe::linear_recurrence", _autograd, setup_context=_setup_context)


def _flops(k_shape, v_shape, log_decay_shape, erase_shape, value_log_decay_shape) -> int:
    batch_size, length, num_heads, value_dim = v_shape
    terms = dict(decay=log_decay_shape is not None or value_log_decay_shape is not None, erase=erase_shape is not None)
    return batch_size * length * recurrence_flops_per_token(num_heads, k_shape[-1], value_dim, **terms)


@register_flop_formula(torch.ops.torchlmoe.linear_recurrence)
def _(q_shape, k_shape, v_shape, log_decay_shape, erase_shape, _, value_log_decay_shape, *rest, **kwargs) -> int:
    return _flops(k_shape, v_shape, log_decay_shape, erase_shape, value_log_decay_shape)


@register_flop_formula(torch.ops.torchlmoe.linear_recurrence_backward)
def _(grad_o, grad_final, *shapes, **kwargs) -> int:
    _, k_shape, v_shape, log_decay_shape, erase_shape, _, value_log_decay_shape, *_ = shapes
    return 2 * _flops(k_shape, v_shape, log_decay_shape, erase_shape, value_log_decay_shape)
