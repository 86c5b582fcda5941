"""The one recurrence behind every linear sequence model: checks, choice of backend, registration with torch.

    S_t = (I - b_t e_t^T) diag(exp g_t) S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

`linear_recurrence` is one operation to torch (forward and backward are a `torch.library.custom_op` pair), so that
compile, recompute and FLOP counters see it whole. `span_summary` says what a span does to the state it receives.
"""

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchlmoe.ops.chunked import chunked_backward, chunked_forward, kept_layout_of
from torchlmoe.ops.reference import reference_recurrence

Backend = Literal["auto", "reference", "chunked", "triton"]
logger = logging.getLogger(__name__)


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
    """Reads and writes a K x V state per head and document, one token after another.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, R, V], R a multiple of H; head j of v reads head j // (R / H) of q and k.
        log_decay: g, natural logarithm, <= 0: None, [R], [B, T, R] or [B, T, R, K].
        erase: [B, T, R], the delta rule's beta (e = beta * b), or [B, T, R, K], e itself.
        erase_key: b, where it is erased, [B, T, R, K]; k unless given.
        value_log_decay: [B, T, R, V], decay on the value side; not together with `erase`.
        bonus: u, [R, K]; o_t reads S_{t-1} + (u * k_t) v_t^T, S_{t-1} not yet decayed; not together with `erase`.
        scale: multiplies o.
        initial_state: [N, R, K, V] in at least float32; N = B, or the number of packed documents. Zero unless given.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int32 [N + 1], bounds of documents packed into one row (B = 1) from 0 to T; empty ones allowed.
        backend: "reference" (token by token), "chunked" (plain PyTorch) or "auto" ("reference" for one token a row).

    Returns:
        o [B, T, R, V] in v's dtype, and the final state [N, R, K, V] in float32 (float64 for float64 input) or None.

    Raises:
        ValueError: shapes, dtypes or terms that do not fit together, or that the backend does not serve.
    """
    _check(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, initial_state, cu_seqlens)
    if backend == "auto" and v.shape[1] == 1 and cu_seqlens is None:
        backend = "reference"  # a step of decoding: the definition is the fastest form of one token
    backend = _choose(backend, erase_key, value_log_decay, bonus)
    o, final_state = _run(
        q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, cu_seqlens, backend
    )
    return o, (final_state if output_final_state else None)


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
) -> tuple[Tensor, Tensor]:
    """The affine map S_out = transition S_in + state that a span of tokens (or each packed document) is.

    Arguments as in `linear_recurrence`; differentiable. Returns the transition, [N, R, K] (a diagonal) without an
    erase term and [N, R, K, K] with one, and the state [N, R, K, V], both in at least float32.
    """
    _check(k, k, v, log_decay, erase, erase_key, value_log_decay, None, None, cu_seqlens)
    if value_log_decay is not None:
        raise ValueError(
            "span_summary does not support value_log_decay yet; log_decay and erase are what it summarises."
        )
    batch_size, length, num_heads, value_dim = v.shape
    key_dim = k.shape[-1]
    num_documents = batch_size if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(v.dtype, torch.float32)
    backend = _choose(backend, erase_key, value_log_decay, None)
    if erase is None:
        _, state = _run(None, k, v, log_decay, None, None, None, None, 1.0, None, cu_seqlens, backend)
        total = torch.zeros(num_documents, num_heads, key_dim, dtype=dtype, device=v.device)
        if log_decay is not None:
            decay = log_decay.to(dtype)
            decay = decay.expand(batch_size, length, num_heads) if decay.dim() == 1 else decay
            decay = (decay if decay.dim() == 4 else decay[..., None]).expand(-1, -1, -1, key_dim)
            total = total.index_add(0, _document_ids(v, cu_seqlens), decay.flatten(0, 1))
        return total.exp(), state
    # The columns of the state do not mix, so the transition is K more of them: no value, started from the identity.
    identity = torch.eye(key_dim, dtype=dtype, device=v.device).expand(num_documents, num_heads, -1, -1)
    initial_state = torch.cat([identity.new_zeros(num_documents, num_heads, key_dim, value_dim), identity], -1)
    wide_v = torch.nn.functional.pad(v, (0, key_dim))
    _, state = _run(None, k, wide_v, log_decay, erase, erase_key, None, None, 1.0, initial_state, cu_seqlens, backend)
    return state[..., value_dim:], state[..., :value_dim]


def recurrence_flops_per_token(
    num_heads: int, key_dim: int, value_dim: int, *, decay: bool = False, erase: bool = False
) -> int:
    """Forward FLOPs of the recurrence as it is defined, token by token (a multiply-add is two), for all heads.

    The chunkwise form spends more; these are the ones that count as the model's own.
    """
    per_element = 4 + decay + 4 * erase  # write and read; decay; read what is erased and take it out
    return num_heads * key_dim * value_dim * per_element


def _document_ids(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    batch_size, length = v.shape[:2]
    if cu_seqlens is None:
        return torch.arange(batch_size, device=v.device).repeat_interleave(length)
    tokens = torch.arange(length, device=v.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def _choose(backend: str, erase_key: Tensor | None, value_log_decay: Tensor | None, bonus: Tensor | None) -> str:
    terms = {"erase_key": erase_key, "value_log_decay": value_log_decay, "bonus": bonus}
    beyond_chunked = [name for name, term in terms.items() if term is not None]
    if backend == "auto":
        if not beyond_chunked:
            return "chunked"
        _say_once(
            f"linear_recurrence runs token by token (slow): {' and '.join(beyond_chunked)} has no chunked form yet."
        )
        return "reference"
    if backend == "triton":
        raise ValueError("backend = 'triton' has no kernels yet; use 'auto', 'chunked' or 'reference'.")
    if backend not in ("reference", "chunked"):
        raise ValueError(f"backend = {backend!r} is unknown; use 'auto', 'chunked' or 'reference'.")
    if backend == "chunked" and beyond_chunked:
        raise ValueError(
            f"backend = 'chunked' does not support {' and '.join(beyond_chunked)} yet; use backend = 'reference'."
        )
    return backend


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _check(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, initial_state, cu_seqlens) -> None:
    def expect(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
        if tensor is not None and tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} has shape {list(tensor.shape)}; with this v it must be {wanted}.")

    if v.dim() != 4 or k.dim() != 4:
        raise ValueError(f"k and v must be [B, T, heads, width]; got {list(k.shape)} and {list(v.shape)}.")
    if not v.dtype.is_floating_point:
        raise ValueError(f"v has dtype {v.dtype}; linear_recurrence takes floating-point tensors.")
    batch_size, length, num_heads, value_dim = v.shape
    num_key_heads, key_dim = k.shape[2:]
    expect("q", q, tuple(k.shape))
    expect("k", k, (batch_size, length, num_key_heads, key_dim))
    if num_heads % num_key_heads:
        raise ValueError(f"v has {num_heads} heads, which is not a multiple of the {num_key_heads} heads of k.")
    per_token = (batch_size, length, num_heads)
    expect("log_decay", log_decay, (num_heads,), per_token, (*per_token, key_dim))
    expect("erase", erase, per_token, (*per_token, key_dim))
    expect("erase_key", erase_key, (*per_token, key_dim))
    expect("value_log_decay", value_log_decay, (*per_token, value_dim))
    expect("bonus", bonus, (num_heads, key_dim))
    if erase_key is not None and erase is None:
        raise ValueError("erase_key says where to erase, but erase (what to erase) is not given.")
    if erase is not None and (value_log_decay is not None or bonus is not None):
        other = "bonus" if bonus is not None else "value_log_decay"
        raise ValueError(f"{other} cannot be combined with erase; give one of the two.")
    num_documents = batch_size
    if cu_seqlens is not None:
        if batch_size != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"cu_seqlens (shape {list(cu_seqlens.shape)}, {cu_seqlens.dtype}) must be int32 [N + 1], with B = 1 "
                f"(B is {batch_size})."
            )
        num_documents = cu_seqlens.shape[0] - 1
    expect("initial_state", initial_state, (num_documents, num_heads, key_dim, value_dim))


def _run(
    q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, cu_seqlens, backend
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference_recurrence(
            q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, cu_seqlens
        )
    return _forward(q, k, v, log_decay, erase, scale, initial_state, cu_seqlens)[:2]


@torch.library.custom_op("torchlmoe::linear_recurrence", mutates_args=())
def _forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = kept_layout_of(v, cu_seqlens)
    return chunked_forward(q, k, v, log_decay, erase, scale, initial_state, cu_seqlens, layout)


@_forward.register_fake
def _(q, k, v, log_decay, erase, scale, initial_state, cu_seqlens):
    num_documents = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    num_heads, key_dim, value_dim = v.shape[2], k.shape[-1], v.shape[-1]
    context = torch.library.get_ctx()

    def of_chunks(*shape: int | torch.SymInt) -> Tensor:
        # How many chunks there are, and of how many tokens, depends on the documents.
        return v.new_empty(*shape, dtype=torch.promote_types(v.dtype, torch.float32))

    state = of_chunks(num_documents, num_heads, key_dim, value_dim)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    chunks = context.new_dynamic_size()
    starts = of_chunks(chunks, key_dim, value_dim)
    if erase is None:
        return o, state, starts, of_chunks(0), of_chunks(0)
    tokens = context.new_dynamic_size()
    return o, state, starts, of_chunks(chunks, tokens, value_dim), of_chunks(chunks, tokens, tokens)


@torch.library.custom_op("torchlmoe::linear_recurrence_backward", mutates_args=())
def _backward(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    final: Tensor,
    starts: Tensor,
    value: Tensor,
    inverse: Tensor,
) -> list[Tensor]:
    """Gradients of q, k, v, log_decay, erase and initial_state; an operation cannot return None, so empty if absent."""
    layout = kept_layout_of(v, cu_seqlens)
    grads = chunked_backward(
        grad_o, grad_final, q, k, v, log_decay, erase, scale, initial_state, layout, final, starts, value, inverse
    )
    return [k.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


@_backward.register_fake
def _(grad_o, grad_final, q, k, v, log_decay, erase, scale, initial_state, *rest):
    return [
        k.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, erase, initial_state)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.scale = scale


def _autograd(ctx, grad_o, grad_final, *_):
    *tensors, initial_state, cu_seqlens, final, starts, value, inverse = ctx.saved_tensors
    grads = _backward(grad_o, grad_final, *tensors, ctx.scale, initial_state, cu_seqlens, final, starts, value, inverse)
    given = [None if x is None else grad for x, grad in zip((*tensors, initial_state), grads, strict=True)]
    return (*given[:5], None, given[5], None)


torch.library.register_autograd("torchlmoe::linear_recurrence", _autograd, setup_context=_setup_context)


def _flops(k_shape, v_shape, log_decay_shape, erase_shape) -> int:
    batch_size, length, num_heads, value_dim = v_shape
    return (batch_size * length) * recurrence_flops_per_token(
        num_heads, k_shape[-1], value_dim, decay=log_decay_shape is not None, erase=erase_shape is not None
    )


@register_flop_formula(torch.ops.torchlmoe.linear_recurrence)
def _(q_shape, k_shape, v_shape, log_decay_shape, erase_shape, *rest, **kwargs) -> int:
    return _flops(k_shape, v_shape, log_decay_shape, erase_shape)


@register_flop_formula(torch.ops.torchlmoe.linear_recurrence_backward)
def _(grad_o, grad_final, q_shape, k_shape, v_shape, log_decay_shape, erase_shape, *rest, **kwargs) -> int:
    return 2 * _flops(k_shape, v_shape, log_decay_shape, erase_shape)
