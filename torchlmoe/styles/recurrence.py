"""Context parallelism for linear sequence models: LASP-2 (arXiv 2502.07563), LASP (2404.02882), for any recurrence.

Each of P ranks holds a span of L tokens. A span acts on the state that it receives as an affine map, however long:

    S_out = A S_in + S_ext         A: a diagonal (decays), K x K (erasing), a diagonal on either side (value decay)

So ranks exchange (A, S_ext), whose size does not grow with the sequence. `all_gather`: one all-gather of all maps in
the forward, one reduce-scatter in the backward; every rank combines the maps of earlier spans. `ring`: each rank sends
the state to the next one. If a state only decays, its contribution to a span's outputs is one product with q, so the
span runs from a zero state while the maps are sent. With an erase term or elementwise decay, reading the state takes a
pass over the span, so a single pass starts from the received state.

Packed documents may straddle any number of ranks. Every rank has the bounds of the whole row. A span's map is that of
its last document. Its first document receives a state if it began on an earlier rank.

The file needs only torch. `LSMSequenceParallel` supports any module with the forward of `LinearRecurrence`:

    forward(q, k, v, *, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, output_final_state,
            cu_seqlens) -> (o, final_state)

    parallelize_module(mixer, mesh["cp"], {"recurrence": LSMSequenceParallel()})

Legend: P ranks, B rows, L tokens of a span, N documents, R heads, K key width, V value width, X states that a span
passes on: one, or one per row (B) if rows are not packed, or one per memory of a document.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

COMMUNICATIONS = ("all_gather", "ring")


@dataclass(frozen=True)
class Span:
    """How the documents of a row lie on the ranks.

    runs: int32 [N * S + 1], bounds of this span's runs of tokens, S per document and most of them empty; None if rows
        are not packed.
    first, last: int64 [X], indices of the runs of the documents of the span's first and last token; None like runs.
    continued_P: bool, by span, whether the document of its first token began in an earlier span.
    whole_P: bool, by span, whether the document of its last token did, so that the received state passes through.
    past: int or 0-dim tensor, number of tokens of the first document before this span.
    """

    runs: Tensor | None
    first: Tensor | None
    last: Tensor | None
    continued_P: Tensor
    whole_P: Tensor
    past: Tensor | int

    @classmethod
    def of_rows(cls, length: int, rank: int, num_ranks: int, device: torch.device) -> "Span":
        """The span of rows that are one document each. length: L."""
        later = torch.arange(num_ranks, device=device) > 0
        return cls(None, None, None, later, torch.ones_like(later), rank * length)

    @classmethod
    def of_documents(
        cls, bounds: Tensor, rank: int, num_ranks: int, length: int | Tensor, runs: Tensor | None = None
    ) -> "Span":
        """The span of a row of packed documents. bounds: int32 [N + 1], of the whole row. length: L.

        runs: see `Span`, if a document has several; by default S = 1.
        """
        starts_P = torch.arange(num_ranks, device=bounds.device, dtype=bounds.dtype) * length
        ends = bounds[1:].contiguous()
        first_P, last_P = (torch.searchsorted(ends, token, right=True) for token in (starts_P, starts_P + length - 1))
        began_P = bounds[first_P]
        start = rank * length
        if runs is None:
            runs = torch.clamp(bounds - start, 0, length)  # type: ignore[arg-type]  # as a tensor too
        states = torch.arange((len(runs) - 1) // (len(bounds) - 1), device=bounds.device)
        return cls(
            runs,
            first_P[rank] * len(states) + states,
            last_P[rank] * len(states) + states,
            began_P < starts_P,
            bounds[last_P] < starts_P,
            start - began_P[rank],
        )

    def bounds_of_last(self) -> Tensor | None:
        """int32 [X + 2]: bounds of all tokens before the last document as one run, then of its runs."""
        if self.runs is None or self.last is None:
            return None
        return torch.cat([self.runs[:1], self.runs[self.last], self.runs[-1:]])

    def end_of_first(self) -> Tensor | None:
        """Position in the span at which the first document ends, if it has one run."""
        return None if self.runs is None or self.first is None else self.runs[self.first + 1]


def all_gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[...] -> [P, ...], of all ranks. The backward is one reduce-scatter of the gradients."""
    # The gradient arrives asynchronously, and views of it do not wait. The multiplication does.
    sharded = DTensor.from_local(x[None] * 1, mesh, [Shard(0)], run_check=False)
    return sharded.redistribute(placements=[Replicate()], async_op=True).to_local(grad_placements=[Partial()])


def _group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a str by another name


# Copies of this file register separate operations.
_NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{_NAMESPACE}::receive_state", mutates_args=())
def receive_state(like: Tensor, rank: int, group_name: str) -> Tensor:
    """Receive the state of the preceding rank, a tensor like `like`. The backward sends its gradient there."""
    received = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(received, group=_group(group_name), group_src=rank - 1)
    return received


@torch.library.custom_op(f"{_NAMESPACE}::send_state", mutates_args=())
def send_state(x: Tensor, state: Tensor, rank: int, group_name: str) -> Tensor:
    """Send `state` to the next rank and return x. The backward receives the state's gradient from there."""
    dist.send(state.contiguous(), group=_group(group_name), group_dst=rank + 1)
    return x.clone()


@torch.library.custom_op(f"{_NAMESPACE}::receive_gradient", mutates_args=())
def _receive_gradient(grad_x: Tensor, like: Tensor, rank: int, group_name: str) -> Tensor:
    received = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(received, group=_group(group_name), group_src=rank + 1)
    return received


@torch.library.custom_op(f"{_NAMESPACE}::send_gradient", mutates_args=())
def _send_gradient(grad: Tensor, rank: int, group_name: str) -> Tensor:
    """Send a gradient to the preceding rank. Returns zeros, the gradient of the `like` of `receive_state`."""
    dist.send(grad.contiguous(), group=_group(group_name), group_dst=rank - 1)
    return torch.zeros_like(grad)


@receive_state.register_fake
def _(like, rank, group_name):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@send_state.register_fake
def _(x, state, rank, group_name):
    return torch.empty_like(x)


@_receive_gradient.register_fake
def _(grad_x, like, rank, group_name):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@_send_gradient.register_fake
def _(grad, rank, group_name):
    return torch.empty_like(grad)


def _setup_receive(ctx, inputs, output) -> None:
    _, ctx.rank, ctx.group_name = inputs


def _setup_send(ctx, inputs, output) -> None:
    _, state, ctx.rank, ctx.group_name = inputs
    ctx.save_for_backward(state)


def _backward_of_receive(ctx, grad):
    return _send_gradient(grad, ctx.rank, ctx.group_name), None, None


def _backward_of_send(ctx, grad):
    return grad, _receive_gradient(grad, ctx.saved_tensors[0], ctx.rank, ctx.group_name), None, None


receive_state.register_autograd(_backward_of_receive, setup_context=_setup_receive)
send_state.register_autograd(_backward_of_send, setup_context=_setup_send)


class StateStyle(ParallelStyle):
    """Replaces a module's forward by `self.run(forward, mesh, q, k, v, ...)`, if there is more than one rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(f"{type(self).__name__} needs a mesh of one axis; got {device_mesh}.")
        if device_mesh.size() > 1:
            module.forward = partial(_without_autocast, self.run, module.forward, device_mesh)
        return module

    def run(self, forward: Callable, mesh: DeviceMesh, q: Tensor, k: Tensor, v: Tensor, **terms) -> tuple[Tensor, None]:
        """Run the module's forward on this rank's span of the sequence."""
        raise TypeError(f"{type(self).__name__} must define run(forward, mesh, q, k, v, **terms).")


class LSMSequenceParallel(StateStyle):
    """Splits the sequence of a module with `LinearRecurrence`'s forward: inputs and o [B, L, R, V] are of the span.

    communication: "all_gather" (LASP-2) or "ring" (LASP).
    span_summary: computes the affine map of a span, like `torchlmoe.ops.span_summary`. If None, the module's forward
        computes it, which also computes outputs that are not used.
    cu_seqlens are bounds in the whole row, from 0 to P * L, on every rank. If the caller passes `document_bounds` (a
    mixture of memories), those are bounds in the whole row, and cu_seqlens are bounds of the span's runs of tokens,
    several per document. Raises ValueError for initial and final states, which belong to no single rank.
    """

    def __init__(self, communication: str = "all_gather", span_summary: Callable | None = None):
        if communication not in COMMUNICATIONS:
            raise ValueError(f"communication = {communication!r} is unknown; use 'all_gather' or 'ring'.")
        self.communication, self.span_summary = communication, span_summary

    def run(
        self,
        forward: Callable,
        mesh: DeviceMesh,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        document_bounds: Tensor | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        **terms,
    ) -> tuple[Tensor, None]:
        if initial_state is not None or output_final_state:
            raise ValueError("Initial and final states are not supported if the sequence is split over ranks.")
        span = _span_of(v, cu_seqlens, document_bounds, mesh)
        *factors, state = self.summarize(forward, k, v, span.bounds_of_last(), terms)
        if span.last is not None:
            *factors, state = (x[-len(span.last) :] for x in (*factors, state))
        if self.reads_by_product(terms) and document_bounds is None:
            gathered = self.start(mesh, factors, state)
            o, _ = forward(q, k, v, cu_seqlens=span.runs, **terms)
            incoming = self.receive(mesh, span, factors, state, gathered)
            return _add_reading(o, q, incoming, span.end_of_first(), **terms), None
        incoming = self.receive(mesh, span, factors, state, self.start(mesh, factors, state))
        if span.runs is not None and span.first is not None:
            states = incoming.new_zeros(len(span.runs) - 1, *incoming.shape[1:])
            incoming = states.index_copy(0, span.first, incoming)
        return forward(q, k, v, cu_seqlens=span.runs, initial_state=incoming, **terms)[0], None

    def reads_by_product(self, terms: dict) -> bool:
        """Whether o_t = (o_t from a zero state) + exp(G_t) q_t S, for a received state S."""
        return terms.get("erase") is None

    def summarize(
        self, forward: Callable, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, terms: dict
    ) -> tuple[Tensor, ...]:
        """Compute the map of each run, in at least float32: the factors of A, then S_ext [X, R, K, V].

        The factors broadcast against the state, such as [X, R, K, 1]; with an erase term A is one matrix [X, R, K, K].
        """
        terms = {name: x for name, x in terms.items() if name not in ("bonus", "scale")}
        summary = self.span_summary or partial(summary_by_forward, forward)
        transition, state = summary(k, v, cu_seqlens=cu_seqlens, **terms)
        of_keys, *of_values = transition if isinstance(transition, tuple) else (transition,)
        if terms.get("erase") is not None:
            return of_keys, state
        factors = [of_value[..., None, :] for of_value in of_values]
        log_decay = terms.get("log_decay")
        if log_decay is not None:  # one number per head if all channels decay alike
            factors.append((of_keys if log_decay.dim() == 4 else of_keys[..., :1])[..., None])
        return *factors, state

    def advance(self, factors: list[Tensor], state: Tensor) -> Tensor:
        """A S, the state after a span that writes nothing."""
        if factors and min(factors[0].shape[-2:]) > 1:
            return factors[0] @ state
        for factor in factors:
            state = factor * state
        return state

    def start(self, mesh: DeviceMesh, factors: list[Tensor], state: Tensor) -> Tensor | None:
        """Start the all-gather of the maps, flattened: [P, X, R, numbers per map]. None for a ring."""
        if self.communication == "ring":
            return None
        numbers = torch.cat([x.to(state.dtype).flatten(2) for x in (*factors, state)], -1)
        return all_gather(torch.view_as_real(numbers).flatten(-2) if numbers.is_complex() else numbers, mesh)

    def receive(
        self, mesh: DeviceMesh, span: Span, factors: list[Tensor], state: Tensor, gathered: Tensor | None
    ) -> Tensor:
        """The state [X, R, K, V] of the span's first document before the span; zero if the document begins there."""
        rank = mesh.get_local_rank()
        if gathered is None:
            return self._ring(mesh, rank, span, factors, state)
        if state.is_complex():
            gathered = torch.complex(*gathered.unflatten(-1, (-1, 2)).unbind(-1))
        *factors_P, states_P = (
            part.unflatten(-1, x.shape[2:])
            for part, x in zip(
                gathered.split([prod(x.shape[2:]) for x in (*factors, state)], -1), (*factors, state), strict=True
            )
        )
        # Rank 0 uses the last state and masks it: every rank must take part in the collective of the backward.
        incoming = states_P[0] if rank else states_P[-1]
        for other in range(1, rank):
            moved = self.advance([x[other] for x in factors_P], incoming)
            incoming = states_P[other] + moved.masked_fill(~span.whole_P[other], 0)
        return incoming.masked_fill(~span.continued_P[rank], 0)

    def _ring(self, mesh: DeviceMesh, rank: int, span: Span, factors: list[Tensor], state: Tensor) -> Tensor:
        name = mesh.get_group().group_name
        incoming = torch.zeros_like(state)
        if rank > 0:
            received = receive_state(_as_real(state), rank, name)
            received = torch.complex(*received.unbind(-1)) if state.is_complex() else received
            incoming = received.masked_fill(~span.continued_P[rank], 0)
        if rank < mesh.size() - 1:
            outgoing = state + self.advance(factors, incoming).masked_fill(~span.whole_P[rank], 0)
            incoming = send_state(incoming, _as_real(outgoing), rank, name)
        return incoming


def _without_autocast(run: Callable, forward: Callable, mesh: DeviceMesh, q: Tensor, k: Tensor, v: Tensor, **terms):
    """Call `run` without autocast, in which products of states would lose digits."""
    device = v.device.type
    if not torch.amp.is_autocast_available(device):
        return run(forward, mesh, q, k, v, **terms)
    with torch.autocast(device, enabled=False):
        return run(forward, mesh, q, k, v, **terms)


def _as_real(x: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, which communication libraries can send."""
    return torch.view_as_real(x) if x.is_complex() else x


class ElementwiseSequenceParallel(LSMSequenceParallel):
    """Like `LSMSequenceParallel`, for a module with `ElementwiseRecurrence`'s forward.

    span_summary: like `torchlmoe.ops.elementwise_span_summary`.
    """

    def __init__(self, communication: str = "all_gather", *, span_summary: Callable):
        super().__init__(communication, span_summary)

    def reads_by_product(self, terms: dict) -> bool:
        return False

    def summarize(
        self, forward: Callable, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, terms: dict
    ) -> tuple[Tensor, ...]:
        assert self.span_summary is not None
        return self.span_summary(k, v, cu_seqlens=cu_seqlens, **terms)

    def advance(self, factors: list[Tensor], state: Tensor) -> Tensor:
        return factors[0] * state


class StateRing(StateStyle):
    """Sends the state from rank to rank, for a module whose update is not an affine map, such as `OnlineGradient`.

    The module takes initial_state [N, ...], for every document of the whole row, and offset [N], the number of tokens
    of a document's current mini-batch that earlier ranks have processed.
    """

    def run(  # type: ignore[override]
        self,
        forward: Callable,
        mesh: DeviceMesh,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        initial_state: Tensor,
        mini_batch_size: int,
        cu_seqlens: Tensor | None = None,
        offset: Tensor | None = None,
        output_final_state: bool = False,
        **terms,
    ) -> tuple[Tensor, None]:
        if offset is not None or output_final_state:
            raise ValueError("Offsets and final states are not supported if the sequence is split over ranks.")
        rank, name = mesh.get_local_rank(), mesh.get_group().group_name
        span = _span_of(v, cu_seqlens, None, mesh)
        own = torch.arange(len(initial_state), device=v.device)
        first, last = (own if x is None else x for x in (span.first, span.last))
        offset = torch.zeros_like(own)
        if rank > 0:
            # The sender's backward waits for a gradient from here if any of its terms needs one. Adding zeros that
            # depend on the same terms makes this rank send it.
            tie = sum(x[:, :0].sum() for x in (k, v, *terms.values()) if isinstance(x, Tensor) and x.dim() > 2)
            fresh = initial_state[first] + tie
            state = torch.where(span.continued_P[rank], receive_state(fresh, rank, name), fresh)
            initial_state = initial_state.index_copy(0, first, state)
            offset = offset.index_put((first,), torch.as_tensor(span.past, device=v.device).long() % mini_batch_size)
        o, state = forward(
            q,
            k,
            v,
            initial_state=initial_state,
            mini_batch_size=mini_batch_size,
            cu_seqlens=span.runs,
            offset=offset,
            output_final_state=True,
            **terms,
        )
        return (send_state(o, state[last], rank, name) if rank < mesh.size() - 1 else o), None


def _span_of(v: Tensor, cu_seqlens: Tensor | None, document_bounds: Tensor | None, mesh: DeviceMesh) -> Span:
    rank, num_ranks = mesh.get_local_rank(), mesh.size()
    if cu_seqlens is None:
        return Span.of_rows(v.shape[1], rank, num_ranks, v.device)
    if document_bounds is None:
        length, bounds = num_ranks * v.shape[1], cu_seqlens
        if type(bounds) is Tensor and bounds.device.type == "cpu" and not torch.compiler.is_compiling():
            places = bounds.tolist()
            if places[0] != 0 or places[-1] != length or places != sorted(places):
                raise ValueError(
                    f"cu_seqlens, from {places[0]} to {places[-1]}, must rise from 0 to the {length} tokens of the "
                    f"whole row, split over {num_ranks} ranks; give the bounds of its documents."
                )
        return Span.of_documents(bounds, rank, num_ranks, v.shape[1])
    return Span.of_documents(document_bounds, rank, num_ranks, document_bounds[-1] // num_ranks, cu_seqlens)


def summary_by_forward(
    forward: Callable, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, **terms: Tensor | None
) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
    """Computes `torchlmoe.ops.span_summary` by the forward of any module like `LinearRecurrence`.

    Without an erase term, the transition is the decay of an initial state of ones: a column of ones for the keys, a row
    for the values. With an erase term, it is the final state after the identity.
    """
    options = {"cu_seqlens": cu_seqlens, "output_final_state": True}
    num_runs = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    num_heads, key_dim = v.shape[2], k.shape[-1]
    _, state = forward(k, k, v, **terms, **options)
    if terms.get("erase") is not None:
        identity = torch.eye(key_dim, dtype=state.dtype, device=v.device).expand(num_runs, num_heads, -1, -1)
        zeros = v.new_zeros(*v.shape[:3], key_dim)
        return forward(k, k, zeros, initial_state=identity, **terms, **options)[1], state
    of_values = terms.pop("value_log_decay", None)
    if terms.get("log_decay") is None:
        of_keys = state.new_ones(num_runs, num_heads, key_dim)
    else:
        ones = state.new_ones(num_runs, num_heads, key_dim, 1)
        of_keys = forward(k, k, torch.zeros_like(v[..., :1]), initial_state=ones, **terms, **options)[1][..., 0]
    if of_values is None:
        return of_keys, state
    zeros, ones = torch.zeros_like(k[..., :1]), state.new_ones(num_runs, num_heads, 1, v.shape[-1])
    decayed = forward(zeros, zeros, v, initial_state=ones, value_log_decay=of_values, **options)[1]
    return (of_keys, decayed[..., 0, :]), state


def _add_reading(
    o: Tensor,
    q: Tensor,
    state: Tensor,
    end: Tensor | None,
    *,
    log_decay: Tensor | None = None,
    value_log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    **_,
) -> Tensor:
    """Adds what q reads from a received state S: o_t + scale * exp(H_t) (exp(G_t) q_t) S for tokens before `end`.

    G and H are the sums of the log decays since the span began. With a bonus a token reads the state before its decay.
    """
    length = o.shape[1]

    def so_far(log: Tensor) -> Tensor:
        if log.dim() == 1:
            log = log.expand(1, length, -1)
        total = log.to(state.dtype).cumsum(1)
        if bonus is not None:  # shifted by a token: subtracting the token's own decay would lose digits
            total = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], 1)
        return total.exp()

    q = q.to(state.dtype).repeat_interleave(o.shape[2] // q.shape[2], 2) * scale
    if log_decay is not None and log_decay.dim() == 4:
        q = q * so_far(log_decay)
    read = torch.einsum("blrk,brkv->blrv", q, state)
    if log_decay is not None and log_decay.dim() < 4:
        read = read * so_far(log_decay)[..., None]
    if value_log_decay is not None:
        read = read * so_far(value_log_decay)
    if end is not None:
        places = torch.arange(length, device=o.device)
        read = read.masked_fill((places >= end)[:, None, None], 0)
    return (o + read).to(o.dtype)
