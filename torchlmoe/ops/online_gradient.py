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

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchlmoe.ops.checks import check_bounds, check_shape, num_documents
from torchlmoe.ops.operation import custom_op, gradients_of, keep_for_backward, operation, size_by_documents
from torchlmoe.ops.pull_back import pull_back
from torchlmoe.ops.scan_backend import check_backend
from torchlmoe.ops.scan_layout import chunk_layout, kept_scan_layout, num_scan_starts

SLAB_STEPS = 16  # mini-batches; one state is kept per slab


class Terms(NamedTuple):
    """The tensor arguments of `online_gradient`."""

    q: Tensor
    k: Tensor
    v: Tensor
    learning_rate: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    log_decay: Tensor | None = None
    log_momentum: Tensor | None = None
    step_scale: Tensor | None = None

    def present(self, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Apply `function` to each term that is not None; returns results by name."""
        return {name: function(x) for name, x in self._asdict().items() if x is not None}


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


@dataclass
class _MiniBatches:
    """The mini-batches of a slab, ordered by place in the document, then from the longest document to the shortest."""

    counts: list[int]  # documents that have a j-th mini-batch of the slab, for each j
    tokens_MC: Tensor  # the token at each slot, counted over all rows; 0 at empty ones
    filled_MC: Tensor  # whether the slot has a token
    complete_M: Tensor  # whether the mini-batch ends with its last slot
    first: bool  # whether the slab's first mini-batches may have begun earlier, so that W differs from W_a

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, ...] -> [M, H, C, ...], zero in empty slots."""
        taken = x.flatten(0, 1)[self.tokens_MC].to(dtype)
        filled = self.filled_MC.view(*self.filled_MC.shape, *[1] * (taken.dim() - 2))
        return taken.masked_fill(~filled, 0).movedim(2, 1)

    def put(self, into: Tensor, x: Tensor) -> None:
        """Writes the filled slots of x [M, H, C, ...] to their tokens in [B, T, H, ...]."""
        rows = x.movedim(1, 2)[self.filled_MC].to(into.dtype)
        into.view(-1, *into.shape[2:]).index_copy_(0, self.tokens_MC[self.filled_MC], rows)


def _mini_batches(
    v: Tensor, cu_seqlens: Tensor | None, offset: Tensor | None, size: int
) -> tuple[list[_MiniBatches], Tensor]:
    """The slabs of mini-batches, and the documents in their order."""
    if offset is None:
        layout = kept_scan_layout(v, cu_seqlens, size, SLAB_STEPS)
        token_at = None
    else:
        # Tokens that were read before get slots too, but empty ones.
        bounds = _bounds(v, cu_seqlens)
        places, shifted = [], [0]
        for start, end, past in zip(bounds, bounds[1:], offset.tolist(), strict=False):
            if end > start:
                places += [-1] * past + list(range(start, end))
            shifted.append(len(places))
        layout = chunk_layout(1, len(places), shifted, size, SLAB_STEPS * len(offset), v.device)
        token_at = torch.tensor(places, dtype=torch.int64, device=v.device)
    slabs: list[_MiniBatches] = []
    for slab in layout.slabs:
        tokens = slab.tokens_MC if token_at is None else token_at[slab.tokens_MC]
        reached = torch.ones_like(tokens, dtype=torch.bool) if slab.padded_MC is None else ~slab.padded_MC
        # A layout of shorter chunks has no document as long as a mini-batch.
        complete = reached.all(1) & (tokens.shape[1] == size)
        filled = reached & (tokens >= 0)
        slabs.append(_MiniBatches(slab.num_active, tokens.clamp_min(0), filled, complete, first=not slabs))
    return slabs, layout.order_N


def _decays(log: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the sums of log [M, H, C] since the start, and between two places, [M, H, C, C] (zero above)."""
    total = log.double().cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).tril()  # no exponent is positive
    return total.to(log.dtype).exp(), between.to(log.dtype).exp().tril()


def _descend(slab: _MiniBatches, norm_eps: float, state: Tensor, terms: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run a slab of mini-batches from the state of its documents; differentiable.

    terms: the present ones of `Terms`, [M, H, C, ...] if they vary with tokens. Returns o [M, H, C, V], and the state
    after the slab or after the document's last mini-batch.
    """
    q, k, v, learning_rate, norm_weight, norm_bias, log_decay, log_momentum, step_scale = Terms(**terms)
    from_start, path = _decays(torch.zeros_like(learning_rate) if log_decay is None else log_decay)
    if log_momentum is not None:
        momentum_from_start, momentum_path = _decays(log_momentum)
        path = path * slab.filled_MC[:, None, None, :]  # an empty slot must not add S to W again
        from_momentum = (path @ momentum_from_start[..., None])[..., 0]
        path = path @ momentum_path
        momentum_key = k * (momentum_path[..., -1, :] * learning_rate)[..., None]
    path = path * learning_rate[..., None, :]
    scores = (q @ k.mT) * path
    written_key = k * path[..., -1, :, None]
    read_q = decayed_q = q * from_start[..., None]
    if step_scale is not None:
        scale = step_scale[:, : q.shape[2], None]  # short documents have fewer slots
        read_q, decayed_q, scores = torch.lerp(q, decayed_q, scale), scale * decayed_q, scale * scores
    if log_momentum is not None:
        momentum_q = q * from_momentum[..., None] * (1 if step_scale is None else scale)
    complete = slab.complete_M[:, None, None, None]
    weight, bias = norm_weight[:, None], norm_bias[:, None]

    outputs, finished = [], []
    start = 0
    for step, count in enumerate(slab.counts):
        rows = slice(start, start + count)
        start += count
        finished.append(state[count:])
        anchor, current, *momentum = state[:count].unbind(2)
        gradient = _gradient(k[rows] @ anchor, v[rows], weight, bias, norm_eps)
        o = read_q[rows] @ anchor - scores[rows] @ gradient
        if slab.first and step == 0:
            o = o + decayed_q[rows] @ (current - anchor)
        changed = from_start[rows, :, -1:, None] * current - written_key[rows].mT @ gradient
        if momentum:
            o = o + momentum_q[rows] @ momentum[0]
            changed = changed + from_momentum[rows, :, -1:, None] * momentum[0]
            kept = momentum_from_start[rows, :, -1:, None] * momentum[0]
            momentum = [kept - momentum_key[rows].mT @ gradient]
        current = ended = changed
        if step_scale is not None:
            ended = torch.lerp(anchor, changed, scale[:, -1:])
            current = torch.where(complete[rows], ended, changed)
        outputs.append(o)
        state = torch.stack([torch.where(complete[rows], ended, anchor), current, *momentum], 2)
    return torch.cat(outputs), torch.cat([state, *reversed(finished)])


def _split(arguments: tuple) -> tuple[Terms, tuple]:
    """The terms, and the arguments of the operation after them."""
    return Terms(*arguments[: len(Terms._fields)]), arguments[len(Terms._fields) :]


def _slab_terms(slab: _MiniBatches, dtype: torch.dtype, terms: Terms) -> dict[str, Tensor]:
    """The terms as `_descend` takes them."""
    return terms.present(lambda x: x.to(dtype) if x.dim() == 2 else slab.take(x, dtype))


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor learning_rate, Tensor norm_weight, Tensor norm_bias, Tensor? log_decay, "
    "Tensor? log_momentum, Tensor? step_scale, Tensor? initial_state, float norm_eps, int mini_batch_size, "
    "Tensor? offset, Tensor? cu_seqlens"
)


@custom_op("torchlmoe::online_gradient", schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o, the final state and, for the backward, each slab's first state, [rows, H, 2 or 3, K, V]."""
    terms, (initial_state, norm_eps, mini_batch_size, offset, cu_seqlens) = _split(arguments)
    v = terms.v
    slabs, order_N = _mini_batches(v, cu_seqlens, offset, mini_batch_size)
    state = _first_state(terms, initial_state, cu_seqlens).index_select(0, order_N)
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    final, starts = state.clone(), []  # an empty document keeps its initial state
    for slab in slabs:
        starts.append(state[: slab.counts[0]])
        o_MHCV, state = _descend(slab, norm_eps, starts[-1], _slab_terms(slab, state.dtype, terms))
        slab.put(o, o_MHCV)
        final[: state.shape[0]] = state
        state = state[: slab.counts[-1]]
    return o, torch.empty_like(final).index_copy_(0, order_N, final), torch.cat([*starts, state[:0]])


@_forward.register_fake
def _(*arguments):
    terms, (initial_state, _, mini_batch_size, offset, cu_seqlens) = _split(arguments)
    state = _first_state(terms, initial_state, cu_seqlens)
    rows = size_by_documents(
        lambda bounds: num_scan_starts(terms.v, bounds, mini_batch_size, SLAB_STEPS),
        terms.v,
        cu_seqlens,
        known=offset is None,
    )
    o = torch.empty_like(terms.v, memory_format=torch.contiguous_format)
    return o, torch.empty_like(state), state.new_empty(rows, *state.shape[1:])


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
    end = starts.shape[0]
    for slab in reversed(slabs):
        state = starts[end - slab.counts[0] : end]
        end -= slab.counts[0]
        grads_of_results = slab.take(grad_o, dtype), grad_state[: slab.counts[0]].clone()
        grad_state[: slab.counts[0]], grads_of_slab = pull_back(
            partial(_descend, slab, norm_eps), (state, _slab_terms(slab, dtype, terms)), grads_of_results
        )
        for name, grad in grads_of_slab.items():
            if grads[name].dim() == 2:
                grads[name] += grad
            else:
                slab.put(grads[name], grad)
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
