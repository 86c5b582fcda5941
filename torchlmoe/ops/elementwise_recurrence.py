"""The recurrence with a separate decay for every element of the state: S4, Mamba, HGRN, fully gated fast weights.

    S_t = exp(G_t) * S_{t-1} + k_t v_t^T          o_t = Re(S_t^T q_t)          * elementwise, S and G in R or C^{K x V}

G_t is given whole, or as step_t[v] * G[k, v], or is constant over tokens. Mamba's selective scan is one head with
K = the state's width and V = channels, with q = C, k = B, v = dt * x, G = A^T and step = dt. S4 has a head for each
channel, V = 1, and q, k and G are constant. A plain scan h_t = exp(g_t) h_{t-1} + x_t is K = 1 with q = k = 1.

If only v varies over tokens and there are many, the recurrence is a convolution (`time_invariant`). Otherwise it is
scanned: tokens are sorted by their place in their document, documents from the longest to the shortest
(`chunk_layout` with chunks of one token). So the tokens of one place are one slice, and the scan takes one fused
multiply-add per place, without padding. Tensors with a state per token exist for one slab of places at a time; the
states between slabs are kept, and the backward computes each slab again. No exponent is positive and nothing is
divided, so gates of any strength keep their digits.

Legend: B batch, T tokens, H heads, K key width, V value width, N documents, P tokens of a slab.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchlmoe.ops.checks import check_bounds, check_bounds_at_hand, check_not_empty, check_shape, num_documents
from torchlmoe.ops.chunk_layout import restore_order
from torchlmoe.ops.kernel_backend import kernels_serve, within_reach
from torchlmoe.ops.operation import custom_op, gradients_of, keep_for_backward, operation, size_by_documents
from torchlmoe.ops.scan_backend import check_backend
from torchlmoe.ops.scan_layout import kept_scan_layout, num_scan_starts
from torchlmoe.ops.time_invariant import time_invariant_backward, time_invariant_forward

SLAB_STEPS = 32  # places; one state is kept per slab
MIN_CONVOLVED = 256  # from this many tokens in a row on, matrices are faster, if only v varies


@operation
def elementwise_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    step: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Read and write a K x V state per head and document, with a separate decay for every element.

    Args:
        q, k: [B, T, H, K], or [H, K] if they are constant over tokens; real or complex.
        v: [B, T, H, V], real.
        log_decay: G, natural logarithm, real part <= 0: [B, T, H, K, V], or [H, K, V] for every token; real or complex.
        step: [B, T, H, V], >= 0: a token's log decay is step[v] * log_decay[k, v], with log_decay [H, K, V].
        initial_state: [N, H, K, V] in at least float32; N = B, or the number of packed documents. Zero unless given.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int32 [N + 1], bounds of documents packed into one row (B = 1) from 0 to T; empty ones allowed.
        backend: "reference" (token by token, by autograd), "chunked" (one operation, memory linear in T), "triton"
            (kernels/elementwise_recurrence.py) or "auto": triton on a GPU, else chunked.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] or None: float32 (float64 for float64 input),
        complex if log_decay, q or k is complex.

    If only v varies, a NaN or an infinity also reaches up to 63 earlier tokens of its document, those of its
    chunk, through products with zero. With "reference" it reaches only later tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or a backend that does not support them.
    """
    _check(q, k, v, log_decay, step, initial_state, cu_seqlens, backend)
    o, state = _run(q, k, v, log_decay, step, initial_state, cu_seqlens, backend)
    return o, (state if output_final_state else None)


@operation
def elementwise_span_summary(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    step: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the affine map S_out = transition * S_in + state of a span of tokens (or of each packed document).

    Arguments as in `elementwise_recurrence`; differentiable. Both results are [N, H, K, V] in the state's dtype.
    """
    _check(None, k, v, log_decay, step, None, cu_seqlens, backend)
    state = _run(None, k, v, log_decay, step, None, cu_seqlens, backend)[1]
    batch_size, length = v.shape[:2]
    if cu_seqlens is None:
        lengths = torch.full((batch_size,), length, device=v.device)
    else:
        lengths = cu_seqlens.diff().long()
    if log_decay.dim() == 3 and step is None:
        total = lengths[:, None, None, None] * log_decay.to(state.dtype)
    else:
        varying = (log_decay if step is None else step).flatten(0, 1)
        varying = varying.to(torch.promote_types(varying.dtype, torch.float32))
        documents = torch.arange(len(lengths), device=v.device).repeat_interleave(lengths, output_size=varying.shape[0])
        total = varying.new_zeros(len(lengths), *varying.shape[1:]).index_add(0, documents, varying)
        if step is not None:
            total = total[:, :, None] * log_decay
    total = total.masked_fill((lengths == 0)[:, None, None, None], 0)  # zero tokens of -inf sum to 0, not NaN
    return total.to(state.dtype).exp(), state


def elementwise_flops_per_token(
    num_heads: int, key_dim: int, value_dim: int, *, step: bool = False, is_complex: bool = False
) -> int:
    """Forward FLOPs per token of the definition (a multiply-add is two, without exponentials), for all heads.

    is_complex: the state, key and query are complex; a product counts six, its real part four.
    """
    per_element = (14 + 2 * step) if is_complex else (5 + step)  # decay, write, add, read; step times rate
    return num_heads * key_dim * value_dim * per_element


def _check(q, k, v, log_decay, step, initial_state, cu_seqlens, backend) -> None:
    check_backend(backend)
    if v.dim() != 4 or k.dim() not in (2, 4):
        raise ValueError(
            f"v must be [B, T, H, V] and k [B, T, H, K] or [H, K]; got {list(v.shape)} and {list(k.shape)}."
        )
    if not v.dtype.is_floating_point:
        raise ValueError(f"v has dtype {v.dtype}; elementwise_recurrence takes real floating-point values.")
    check_not_empty(k, v)
    batch_size, length, num_heads, value_dim = v.shape
    key_dim = k.shape[-1]
    for name, tensor in (("q", q), ("k", k)):
        check_shape(name, tensor, (batch_size, length, num_heads, key_dim), (num_heads, key_dim))
    matrix = (num_heads, key_dim, value_dim)
    if step is None:
        check_shape("log_decay", log_decay, matrix, (batch_size, length, *matrix))
    else:
        check_shape("step", step, tuple(v.shape))
        check_shape("log_decay", log_decay, matrix)
    check_shape("initial_state", initial_state, (num_documents(v, cu_seqlens), *matrix))


def _run(q, k, v, log_decay, step, initial_state, cu_seqlens, backend) -> tuple[Tensor, Tensor]:
    terms = (q, k, v, log_decay, step, initial_state, cu_seqlens)
    if backend == "reference" and v.shape[0] and v.shape[1]:
        return _reference(*terms)
    if kernels_serve(backend, *terms):
        # Only now: when they are imported, Triton decides whether to interpret them.
        from torchlmoe.kernels import elementwise_recurrence_backward as kernels

        check_bounds_at_hand(cu_seqlens, v.shape[1])
        return kernels.elementwise_recurrence(*map(within_reach, terms))[:2]
    return _forward(*terms)[:2]


def _state_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _first_state(q, k, v, log_decay, initial_state, cu_seqlens) -> Tensor:
    if initial_state is not None:
        return initial_state.to(_state_dtype(q, k, v, log_decay))
    shape = (num_documents(v, cu_seqlens), v.shape[2], k.shape[-1], v.shape[-1])
    return torch.zeros(shape, dtype=_state_dtype(q, k, v, log_decay), device=v.device)


def _reference(q, k, v, log_decay, step, initial_state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Token by token, differentiable by autograd: the definition in code. Without q, o is zero."""
    state_NHKV = _first_state(q, k, v, log_decay, initial_state, cu_seqlens)
    dtype = state_NHKV.dtype
    batch_size, length = v.shape[:2]
    spans = [(row, 0, length) for row in range(batch_size)]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        check_bounds(bounds, length)
        spans = [(0, start, end) for start, end in zip(bounds, bounds[1:], strict=False)]

    def at(x: Tensor, row: int, t: int) -> Tensor:
        return (x if x.dim() < 4 else x[row, t]).to(dtype)

    rows: list[list[Tensor]] = [[] for _ in range(batch_size)]
    last_states = []
    for state, (row, start, end) in zip(state_NHKV, spans, strict=True):
        for t in range(start, end):
            decay = at(log_decay, row, t)
            if step is not None:
                decay = at(step, row, t)[:, None] * decay
            state = decay.exp() * state + at(k, row, t)[..., None] * at(v, row, t)[:, None]
            if q is not None:
                rows[row].append(_real_like(torch.einsum("hk,hkv->hv", at(q, row, t), state), v))
        last_states.append(state)
    final_state = torch.stack(last_states) if last_states else state_NHKV
    if q is None or length == 0:
        return torch.zeros_like(v), final_state
    return torch.stack([torch.stack(row) for row in rows]).to(v.dtype), final_state


def _take(x: Tensor, tokens: Tensor, token_dim: int, dtype: torch.dtype) -> Tensor:
    """The tokens of x [B, T, ...] as [P, ...]; x without tokens (of fewer dims) as [1, ...]."""
    rows = x.flatten(0, 1).index_select(0, tokens) if x.dim() == token_dim else x[None]
    return rows.to(dtype)


def _decay(log_decay: Tensor, step: Tensor | None, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    decay = _take(log_decay, tokens, 5, dtype)
    if step is not None:
        decay = _take(step, tokens, 4, dtype)[:, :, None] * decay
    return decay.exp()


def _by_place(x: Tensor, counts: list[int]) -> list[Tensor]:
    """Views of a slab's rows, one per place; a tensor that is constant over tokens is the same at every place."""
    return list(x.split(counts)) if x.shape[0] == sum(counts) else [x] * len(counts)


def _real_like(x: Tensor, like: Tensor) -> Tensor:
    return x.real if x.is_complex() and not like.is_complex() else x


def _over_keys(q_PHK: Tensor, state_PHKV: Tensor) -> Tensor:
    """sum_k q_k S_kv"""
    if state_PHKV.shape[-1] == 1:  # a matrix product of that shape is slow
        return (q_PHK[..., None] * state_PHKV).sum(-2)
    return torch.matmul(q_PHK[..., None, :], state_PHKV)[..., 0, :]


def _over_values(state_PHKV: Tensor, v_PHV: Tensor) -> Tensor:
    """sum_v S_kv v_v"""
    if state_PHKV.shape[-1] == 1:
        return state_PHKV[..., 0] * v_PHV
    return torch.matmul(state_PHKV, v_PHV[..., None])[..., 0]


def _is_convolution(q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor, step: Tensor | None) -> bool:
    """Whether only v varies over tokens, and there are enough tokens (see `time_invariant`)."""
    constant = step is None and log_decay.dim() == 3 and k.dim() == 2 and (q is None or q.dim() == 2)
    return constant and v.shape[1] >= MIN_CONVOLVED


@custom_op("torchlmoe::elementwise_recurrence")
def _forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    step: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o, the final state and, for the backward, the state at the start of each slab, [rows, H, K, V]."""
    if _is_convolution(q, k, v, log_decay, step):
        state = _first_state(q, k, v, log_decay, initial_state, cu_seqlens)
        return *time_invariant_forward(q, k, v, log_decay, state, cu_seqlens), state[:0].clone()
    layout = kept_scan_layout(v, cu_seqlens, 1, SLAB_STEPS)
    state = _first_state(q, k, v, log_decay, initial_state, cu_seqlens).index_select(0, layout.order_N)
    dtype = state.dtype
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    final, starts = torch.empty_like(state), []
    for slab in layout.slabs:
        tokens, counts = slab.tokens_MC[:, 0], slab.num_active
        starts.append(state[: counts[0]])
        decay = _decay(log_decay, step, tokens, dtype)
        states = _take(k, tokens, 4, dtype)[..., None] * _take(v, tokens, 4, dtype)[:, :, None]
        for now, decay_now in zip(states.split(counts), _by_place(decay, counts), strict=True):
            if now.shape[0] < state.shape[0]:
                final[now.shape[0] : state.shape[0]] = state[now.shape[0] :]
                state = state[: now.shape[0]]
            state = now.addcmul_(decay_now, state)
        if q is not None:
            read = _real_like(_over_keys(_take(q, tokens, 4, dtype), states), o)
            o.view(-1, *v.shape[2:]).index_copy_(0, tokens, read.to(o.dtype))
    final[: state.shape[0]] = state
    return o, restore_order([layout], final), torch.cat([*starts, state[:0]])


@_forward.register_fake
def _(q, k, v, log_decay, step, initial_state, cu_seqlens):
    state = _first_state(q, k, v, log_decay, initial_state, cu_seqlens)
    if type(v.shape[1]) is int and _is_convolution(q, k, v, log_decay, step):
        rows = 0
    else:
        rows = size_by_documents(lambda bounds: num_scan_starts(v, bounds, 1, SLAB_STEPS), v, cu_seqlens)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, torch.empty_like(state), state.new_empty(rows, *state.shape[1:])


def _slab_states(
    k_PHK: Tensor, v_PHV: Tensor, decay: Tensor, first_states: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Each token's state, and its decayed predecessor exp(G_t) * S_{t-1}: [P, H, K, V] each."""
    states = k_PHK[..., None] * v_PHV[:, :, None]
    decayed = torch.empty_like(states)
    places = zip(states.split(counts), decayed.split(counts), _by_place(decay, counts), strict=True)
    state = first_states
    for now, decayed_now, decay_now in places:
        torch.mul(decay_now, state[: now.shape[0]], out=decayed_now)
        state = now.add_(decayed_now)
    return states, decayed


def _scan_back(grad_states: Tensor, decay: Tensor, counts: list[int], carry: Tensor, grad_final: Tensor) -> Tensor:
    """Add to each state's gradient [P, H, K, V], in place, the part from the next token; the last place first.

    Args:
        grad_states: the part from each token's own output.
        carry: the next slab's gradient of the last states, for documents that continue there.
        grad_final: of the final states, [N, H, K, V], for documents that end in this slab.

    Returns:
        The gradient of the states at the start of the slab.
    """
    by_place = grad_states.split(counts)
    conjugates = _by_place(torch.conj_physical(decay), counts)
    for place in reversed(range(len(counts))):
        now = by_place[place]
        if place + 1 < len(counts):
            later = by_place[place + 1]
            num_continuing = later.shape[0]
            now[:num_continuing].addcmul_(conjugates[place + 1], later)
        else:
            num_continuing = carry.shape[0]
            now[:num_continuing] += carry
        if num_continuing < now.shape[0]:
            now[num_continuing:] += grad_final[num_continuing : now.shape[0]]
    return conjugates[0] * by_place[0]


def _give(grad: Tensor | None, tokens: Tensor, token_dim: int, rows: Tensor) -> None:
    """Write the rows of `tokens` into a gradient of token_dim dims; sum them if the gradient has no token dimension."""
    assert grad is not None
    rows = _real_like(rows, grad).to(grad.dtype)
    if grad.dim() == token_dim:
        grad.view(-1, *grad.shape[2:]).index_copy_(0, tokens, rows)
    else:
        grad += rows.sum(0)


def _scan_backward(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    step: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of q, k, v, log_decay and step, None if absent, and of the initial state; slabs from last to first."""
    layout = kept_scan_layout(v, cu_seqlens, 1, SLAB_STEPS)
    dtype = starts.dtype
    grads = [
        None if x is None else torch.zeros_like(x, dtype=_state_dtype(x), memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, step)
    ]
    grad_q, grad_k, grad_v, grad_log_decay, grad_step = grads
    grad_final = grad_final.to(dtype).index_select(0, layout.order_N)
    carry = grad_final[:0]
    end = starts.shape[0]
    for slab in reversed(layout.slabs):
        tokens, counts = slab.tokens_MC[:, 0], slab.num_active
        first_states = starts[end - counts[0] : end]
        end -= counts[0]
        k_PHK, v_PHV = _take(k, tokens, 4, dtype), _take(v, tokens, 4, dtype)
        decay = _decay(log_decay, step, tokens, dtype)
        states, decayed = _slab_states(k_PHK, v_PHV, decay, first_states, counts)
        if q is None:
            grad_states = torch.zeros_like(states)
        else:
            q_PHK, grad_o_PHV = _take(q, tokens, 4, dtype), _take(grad_o, tokens, 4, dtype)
            grad_states = torch.conj_physical(q_PHK)[..., None] * grad_o_PHV[:, :, None]
            _give(grad_q, tokens, 4, _over_values(torch.conj_physical(states), grad_o_PHV))
        carry = _scan_back(grad_states, decay, counts, carry, grad_final)
        _give(grad_k, tokens, 4, _over_values(grad_states, v_PHV))
        _give(grad_v, tokens, 4, _over_keys(torch.conj_physical(k_PHK), grad_states))
        grad_decay = grad_states.mul_(torch.conj_physical(decayed))
        if step is None:
            _give(grad_log_decay, tokens, 5, grad_decay)
        else:
            _give(grad_step, tokens, 4, (grad_decay * torch.conj_physical(log_decay)).sum(2))
            _give(grad_log_decay, tokens, 5, grad_decay.mul_(_take(step, tokens, 4, dtype)[:, :, None]))
    # A document without tokens passes the gradient of its final state to its initial state.
    grad_initial = torch.cat([carry, grad_final[carry.shape[0] :]])
    return grads, restore_order([layout], grad_initial)


@custom_op("torchlmoe::elementwise_recurrence_backward")
def _backward(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    step: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
) -> list[Tensor]:
    """Gradients of q, k, v, log_decay, step and initial_state; an operation cannot return None, so empty if absent."""
    if _is_convolution(q, k, v, log_decay, step):
        state = _first_state(q, k, v, log_decay, initial_state, cu_seqlens)
        *of_terms, of_state = time_invariant_backward(grad_o, grad_final, q, k, v, log_decay, state, cu_seqlens)
        grads: list[Tensor | None] = [*of_terms, None]  # no step
    else:
        grads, of_state = _scan_backward(grad_o, grad_final, q, k, v, log_decay, step, cu_seqlens, starts)
    return [
        k.new_empty(0) if x is None or grad is None else _real_like(grad, x).to(x.dtype).contiguous()
        for x, grad in zip((q, k, v, log_decay, step, initial_state), (*grads, of_state), strict=True)
    ]


@_backward.register_fake
def _(grad_o, grad_final, q, k, v, log_decay, step, initial_state, *rest):
    return [
        k.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, step, initial_state)
    ]


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])
    keep_for_backward(ctx, output[:2], output[2])


def _autograd(ctx, *grads_of_outputs):
    grad_o, grad_final = gradients_of(ctx, grads_of_outputs)
    *inputs, starts = ctx.saved_tensors
    grads = _backward(grad_o, grad_final, *inputs, starts)
    return (*(None if x is None else grad for x, grad in zip(inputs[:6], grads, strict=True)), None)


torch.library.register_autograd("torchlmoe::elementwise_recurrence", _autograd, setup_context=_setup_context)


def _flops(q, k, v, log_decay, step) -> int:
    batch_size, length, num_heads, value_dim = v.shape
    return (batch_size * length) * elementwise_flops_per_token(
        num_heads, k.shape[-1], value_dim, step=step is not None, is_complex=_state_dtype(q, k, log_decay).is_complex
    )


@register_flop_formula(torch.ops.torchlmoe.elementwise_recurrence, get_raw=True)
def _(q, k, v, log_decay, step, *rest, **kwargs) -> int:
    return _flops(q, k, v, log_decay, step)


@register_flop_formula(torch.ops.torchlmoe.elementwise_recurrence_backward, get_raw=True)
def _(grad_o, grad_final, q, k, v, log_decay, step, *rest, **kwargs) -> int:
    return 2 * _flops(q, k, v, log_decay, step)
