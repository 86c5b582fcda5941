"""Fast weights trained on an inner loss at every token: TTT (arXiv 2407.04620), Titans (arXiv 2501.00663).

    l_t(W) = |LN(W^T k_t) - v_t|^2 / 2                           LN: layer norm with a weight and a bias for each head
    S_t    = exp(m_t) S_{t-1} - lr_t dl_t/dW (W_a)               W_a: W at the start of the mini-batch that t is in
    W_t    = exp(g_t) W_{t-1} + S_t          o_t = W_t^T q_t

The gradient is k_t G_t^T, with G_t the gradient of the layer norm's input, so a mini-batch is a few matrix products
(the dual form). With A and M the sums of g and m since its start, and S and W at its start:

    P_ts = sum_{r=s..t} exp(A_t - A_r) exp(M_r - M_s)            f_t = sum_{r<=t} exp(A_t - A_r) exp(M_r)
    O    = exp(A) * (Q W) + f * (Q S) - (Q K^T * P * lr) G       W and S after it likewise, with K in place of Q

Without momentum, S is the step alone and P_ts = exp(A_t - A_s). A step scale, a number r_i for each place of a
mini-batch, weights its change so far: the token there reads W_a + r_i (W_t - W_a). The next mini-batch starts from the
weights that the last token reads.

Mini-batches run one after another, over all documents and heads at once. They start anew with every document; `offset`
is the number of tokens of its first mini-batch that were read before. The forward keeps one state per slab of
mini-batches, and the backward runs and differentiates each slab again.

Legend: B batch, T tokens, H heads, K key width, V value width, N documents, M mini-batches, C slots of a mini-batch.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchlmoe.ops.checks import check_bounds, check_shape, num_documents
from torchlmoe.ops.chunk_layout import Slab, chunk_plan
from torchlmoe.ops.mini_batches import MiniBatches, Terms, descend, read, weigh
from torchlmoe.ops.mini_batches_backward import climb
from torchlmoe.ops.operation import custom_op, gradients_of, keep_for_backward, operation, size_by_documents
from torchlmoe.ops.scan_backend import check_backend
from torchlmoe.ops.scan_layout import chunk_layout, kept_chunk_layout
from torchlmoe.ops.vjp import vjp

SLAB_TOKENS = 16384  # times heads; one state is kept per slab


@operation
def online_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    learning_rate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    step_scale: Tensor | None = None,
    norm_eps: float = 1e-6,
    mini_batch_size: int = 16,
    initial_state: Tensor | None = None,
    offset: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Read K x V weights per head and document, which take a gradient step on the inner loss at every token.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V], the target of the inner model for input k.
        learning_rate: [B, T, H], >= 0.
        norm_weight, norm_bias: [H, V], of the layer norm in the inner loss.
        log_decay: g, [B, T, H], finite and <= 0: natural logarithm of the decay of W; no decay unless given.
        log_momentum: m, [B, T, H], finite and <= 0: natural logarithm of the decay of S; no momentum unless given.
        step_scale: r, [H or 1, mini_batch_size], >= 0: the weight of the step so far, by place in the
            mini-batch; one unless given.
        norm_eps: of the layer norm.
        mini_batch_size: tokens whose gradients are taken at the same weights.
        initial_state: [N, H, 2 or 3, K, V] in at least float32: the weights W_a at which the first mini-batch takes its
            gradients, the weights W so far, and with momentum S; N = B, or the number of packed documents. Zero unless
            given. At the start of a mini-batch the first two are equal.
        offset: int [N], tokens of each document's first mini-batch that are part of `initial_state` already.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int32 [N + 1], bounds of documents packed into one row (B = 1) from 0 to T; empty ones allowed.
        backend: "reference" (token by token), "chunked" (mini-batch by mini-batch) or "auto".

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None. To continue from it, pass the offset (offset +
        length) % mini_batch_size.

    A NaN or an infinity also reaches the earlier tokens of its mini-batch, through products with zero; with
    "reference" it reaches only later tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown backend.
    """
    terms = Terms(q, k, v, learning_rate, norm_weight, norm_bias, log_decay, log_momentum, step_scale)
    _check(terms, mini_batch_size, initial_state, offset, cu_seqlens, backend)
    if backend == "reference" and v.shape[0] and v.shape[1]:
        o, state = _reference(terms, initial_state, norm_eps, mini_batch_size, offset, cu_seqlens)
    else:
        o, state, _ = _forward(*terms, initial_state, norm_eps, mini_batch_size, offset, cu_seqlens)
    return o, (state if output_final_state else None)


def online_gradient_flops_per_token(
    num_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    decay: bool = False,
    momentum: bool = False,
    step_scale: bool = False,
) -> int:
    """Forward FLOPs per token of the definition (a multiply-add is two, without the layer norm), for all heads."""
    # W^T k, the gradient, W^T q; decay; S's decay and W + S; W_a^T q.
    per_element = 6 + decay + 2 * momentum + 2 * step_scale
    return num_heads * key_dim * value_dim * per_element


def _check(terms: Terms, mini_batch_size: int, initial_state, offset, cu_seqlens, backend: str) -> None:
    q, k, v = terms[:3]
    check_backend(backend, "online_gradient")
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size = {mini_batch_size} must be at least 1.")
    if v.dim() != 4 or k.dim() != 4:
        raise ValueError(f"k and v must be [B, T, H, width]; got {list(k.shape)} and {list(v.shape)}.")
    if not v.dtype.is_floating_point:
        raise ValueError(f"v has dtype {v.dtype}; online_gradient takes floating-point tensors.")
    batch_size, length, num_heads, value_dim = v.shape
    check_shape("k", k, (batch_size, length, num_heads, k.shape[-1]))
    check_shape("q", q, tuple(k.shape))
    for name in ("learning_rate", "log_decay", "log_momentum"):
        check_shape(name, getattr(terms, name), (batch_size, length, num_heads))
    check_shape("norm_weight", terms.norm_weight, (num_heads, value_dim))
    check_shape("norm_bias", terms.norm_bias, (num_heads, value_dim))
    check_shape("step_scale", terms.step_scale, (num_heads, mini_batch_size), (1, mini_batch_size))
    documents, parts = num_documents(v, cu_seqlens), 2 if terms.log_momentum is None else 3
    check_shape("initial_state", initial_state, (documents, num_heads, parts, k.shape[-1], value_dim))
    check_shape("offset", offset, (documents,))


def _first_state(terms: Terms, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    k, v = terms.k, terms.v
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.to(dtype)
    parts = 2 if terms.log_momentum is None else 3
    shape = (num_documents(v, cu_seqlens), v.shape[2], parts, k.shape[-1], v.shape[-1])
    return torch.zeros(shape, dtype=dtype, device=v.device)


def _bounds(v: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Bounds of the documents in the tokens of all rows, one row after another."""
    if cu_seqlens is None:
        return [row * v.shape[1] for row in range(v.shape[0] + 1)]
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, v.shape[1])
    return bounds


def _gradient(z: Tensor, target: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    """d(|LN(z) - target|^2 / 2) / dz over the last dim."""
    variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    inverse = (variance + eps).rsqrt()
    unit = (z - mean) * inverse
    error = (unit * norm_weight + norm_bias - target) * norm_weight
    return (error - error.mean(-1, keepdim=True) - unit * (error * unit).mean(-1, keepdim=True)) * inverse


def _reference(
    terms: Terms, initial_state, norm_eps: float, mini_batch_size: int, offset, cu_seqlens
) -> tuple[Tensor, Tensor]:
    """Token by token, differentiable by autograd: the definition in code."""
    states, v = _first_state(terms, initial_state, cu_seqlens), terms.v
    bounds = _bounds(v, cu_seqlens)
    offsets = [0] * len(states) if offset is None else offset.tolist()
    q, k, target, learning_rate, norm_weight, norm_bias, log_decay, log_momentum, step_scale = Terms(
        **terms.present(lambda x: (x if x.dim() == 2 else x.flatten(0, 1)).to(states.dtype))
    )
    keep = None if log_decay is None else log_decay.exp()[..., None, None]
    keep_momentum = None if log_momentum is None else log_momentum.exp()[..., None, None]
    outputs, last_states = [], []
    for state, place, start, end in zip(states, offsets, bounds, bounds[1:], strict=False):
        anchor, weights, *momentum = state.unbind(1)
        for t in range(start, end):
            prediction = torch.einsum("hk,hkv->hv", k[t], anchor)
            gradient = _gradient(prediction, target[t], norm_weight, norm_bias, norm_eps)
            change = -learning_rate[t][:, None, None] * k[t][:, :, None] * gradient[:, None]
            if keep_momentum is not None:
                change = keep_momentum[t] * momentum[0] + change
                momentum = [change]
            weights = (weights if keep is None else keep[t] * weights) + change
            read = weights
            if step_scale is not None:
                read = anchor + step_scale[:, place % mini_batch_size, None, None] * (weights - anchor)
            outputs.append(torch.einsum("hk,hkv->hv", q[t], read))
            place += 1
            if place % mini_batch_size == 0:
                anchor = weights = read
        last_states.append(torch.stack([anchor, weights, *momentum], 1))
    o = torch.stack(outputs).view(v.shape).to(v.dtype) if outputs else torch.zeros_like(v)
    return o, torch.stack(last_states) if last_states else states


def _mini_batches(
    v: Tensor, cu_seqlens: Tensor | None, offset: Tensor | None, size: int
) -> tuple[list[MiniBatches], Tensor]:
    """The slabs of mini-batches, and the documents in their order."""
    num_heads = v.shape[2]
    if offset is None:
        layout = kept_chunk_layout(
            *_layout_key(v, None if cu_seqlens is None else tuple(cu_seqlens.tolist()), size), v.device
        )
        token_at = None
    else:
        # Tokens that were read before get slots too, but empty ones.
        bounds = _bounds(v, cu_seqlens)
        places, shifted = [], [0]
        for start, end, past in zip(bounds, bounds[1:], offset.tolist(), strict=False):
            if end > start:
                places += [-1] * past + list(range(start, end))
            shifted.append(len(places))
        layout = chunk_layout(1, len(places), shifted, size, _slab_size(num_heads, size), v.device)
        token_at = torch.tensor(places, dtype=torch.int64, device=v.device)
    batches: list[MiniBatches] = []
    for slab in layout.slabs:
        # A layout of shorter chunks has no document as long as a mini-batch.
        reached = torch.ones_like(slab.tokens_MC, dtype=torch.bool) if slab.padded_MC is None else ~slab.padded_MC
        complete = reached.all(1) & (reached.shape[1] == size)
        if token_at is not None:
            tokens = token_at[slab.tokens_MC]
            slab = Slab(slab.num_active, tokens.clamp_min(0), ~reached | (tokens < 0), None)
        batches.append(MiniBatches(slab, num_heads, complete, first=not batches))
    return batches, layout.order_N


def _layout_key(v: Tensor, bounds: tuple[int, ...] | None, size: int) -> tuple:
    batch_size, length, num_heads = v.shape[:3]
    return batch_size, length, bounds, size, _slab_size(num_heads, size)


def _slab_size(num_heads: int, size: int) -> int:
    return max(1, SLAB_TOKENS // (size * num_heads))


def _split(arguments: tuple) -> tuple[Terms, tuple]:
    """The terms, and the arguments of the operation after them."""
    return Terms(*arguments[: len(Terms._fields)]), arguments[len(Terms._fields) :]


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor learning_rate, Tensor norm_weight, Tensor norm_bias, Tensor? log_decay, "
    "Tensor? log_momentum, Tensor? step_scale, Tensor? initial_state, float norm_eps, int mini_batch_size, "
    "Tensor? offset, Tensor? cu_seqlens"
)


@custom_op("torchlmoe::online_gradient", schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o, the final state and, for the backward, each slab's first state, [rows * H, 2 or 3, K, V]."""
    terms, (initial_state, norm_eps, mini_batch_size, offset, cu_seqlens) = _split(arguments)
    v = terms.v
    slabs, order_N = _mini_batches(v, cu_seqlens, offset, mini_batch_size)
    final = _first_state(terms, initial_state, cu_seqlens).index_select(0, order_N)
    o, starts = torch.zeros_like(v, memory_format=torch.contiguous_format), []
    state = final.flatten(0, 1)  # an empty document keeps its initial state
    for slab in slabs:
        starts.append(state[: slab.counts[0]].clone())
        steps, reads = weigh(slab, slab.cut_terms(terms, state.dtype))
        states, _, state[: slab.counts[0]] = descend(slab, norm_eps, steps, starts[-1])
        slab.slab.paste(read(reads, states), o)
    return o, torch.empty_like(final).index_copy_(0, order_N, final), torch.cat([*starts, state[:0]])


@_forward.register_fake
def _(*arguments):
    terms, (initial_state, _, mini_batch_size, offset, cu_seqlens) = _split(arguments)
    state = _first_state(terms, initial_state, cu_seqlens)
    rows = size_by_documents(
        lambda bounds: chunk_plan(*_layout_key(terms.v, bounds, mini_batch_size)).num_first * terms.v.shape[2],
        terms.v,
        cu_seqlens,
        known=offset is None,
    )
    o = torch.empty_like(terms.v, memory_format=torch.contiguous_format)
    return o, torch.empty_like(state), state.new_empty(rows, *state.shape[2:])


@custom_op(
    "torchlmoe::online_gradient_backward",
    schema=f"(Tensor grad_o, Tensor grad_final, Tensor starts, {_ARGUMENTS}) -> Tensor[]",
)
def _backward(grad_o: Tensor, grad_final: Tensor, starts: Tensor, *arguments) -> list[Tensor]:
    """Gradients of q .. initial_state; an operation cannot return None, so empty if absent."""
    terms, (initial_state, norm_eps, mini_batch_size, offset, cu_seqlens) = _split(arguments)
    v = terms.v
    slabs, order_N = _mini_batches(v, cu_seqlens, offset, mini_batch_size)
    dtype = starts.dtype
    grads = terms.present(lambda x: torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format))
    grad_state = grad_final.to(dtype).index_select(0, order_N)  # of every document's state after the slab
    of_documents, end = grad_state.flatten(0, 1), starts.shape[0]
    for slab in reversed(slabs):
        count = slab.counts[0]
        state, end = starts[end - count : end], end - count
        (steps, reads), of_weigh = vjp(partial(weigh, slab), slab.cut_terms(terms, dtype))
        states, inner, _ = descend(slab, norm_eps, steps, state)
        grad_reads, grad_states = vjp(read, reads, states)[1](slab.cut(grad_o, dtype))
        grad_steps, of_documents[:count] = climb(
            slab, norm_eps, steps, states, inner, grad_states, of_documents[:count]
        )
        (grads_of_slab,) = of_weigh((grad_steps, grad_reads))
        for name, grad in grads_of_slab.items():
            if grads[name].dim() == 2:
                grads[name] += grad
            else:
                slab.slab.paste(grad, grads[name])
    result = [v.new_empty(0) if x is None else grads[name].to(x.dtype) for name, x in terms._asdict().items()]
    if initial_state is None:
        return [*result, v.new_empty(0)]
    return [*result, torch.empty_like(grad_state).index_copy_(0, order_N, grad_state).to(initial_state.dtype)]


@_backward.register_fake
def _(grad_o, grad_final, starts, *arguments):
    return [
        grad_o.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in arguments[:10]  # up to the initial state
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.norm_eps, ctx.mini_batch_size, offset, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, offset, cu_seqlens, output[2])
    keep_for_backward(ctx, output[:2], output[2])


def _autograd(ctx, *grads_of_outputs):
    grad_o, grad_final = gradients_of(ctx, grads_of_outputs)
    *tensors, offset, cu_seqlens, starts = ctx.saved_tensors
    grads = _backward(grad_o, grad_final, starts, *tensors, ctx.norm_eps, ctx.mini_batch_size, offset, cu_seqlens)
    return (*(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), None, None, None, None)


torch.library.register_autograd("torchlmoe::online_gradient", _autograd, setup_context=_setup_context)


def _flops(shapes: Terms) -> int:
    batch_size, length, num_heads, value_dim = shapes.v
    return (batch_size * length) * online_gradient_flops_per_token(
        num_heads,
        shapes.k[-1],  # type: ignore[arg-type]
        value_dim,
        decay=shapes.log_decay is not None,
        momentum=shapes.log_momentum is not None,
        step_scale=shapes.step_scale is not None,
    )


@register_flop_formula(torch.ops.torchlmoe.online_gradient)
def _(*shapes, **kwargs) -> int:
    return _flops(_split(shapes)[0])


@register_flop_formula(torch.ops.torchlmoe.online_gradient_backward)
def _(grad_o, grad_final, starts, *shapes, **kwargs) -> int:
    return 2 * _flops(_split(shapes)[0])
