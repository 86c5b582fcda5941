"""Computes log-likelihoods of continuations, many at a time and without padding.

Requests are packed into rows as documents are in training. If requests share a long context, such as several answers to
one question after many examples, the model reads it once and continues from copies of its state.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import Tensor

from torchlmoe.inference.cache import new_cache, read_pieces
from torchlmoe.model.batch import describe
from torchlmoe.model.decoder import Decoder

TOKENS_AT_ONCE = 4096  # in a packed row
COPIED = 8  # tokens in copies of a state, for each token of a packed row
MIN_SAVED = 1024  # tokens that sharing a context must save, since it costs extra calls
LOGITS_AT_ONCE = 2**24  # numbers, which bounds the memory of the head
Tokens = tuple[int, ...]


class Request(NamedTuple):
    """Token ids. The context has at least one, from which the first token of the continuation is predicted."""

    context: Tokens
    continuation: Tokens

    @property
    def read(self) -> Tokens:
        """The tokens that the model reads: all but the last."""
        return (*self.context, *self.continuation[:-1])


class Score(NamedTuple):
    """log_likelihood: sum of natural logarithms, in float64. is_greedy: whether each token is the likeliest one."""

    log_likelihood: float
    is_greedy: bool


@torch.inference_mode()
def score(
    model: Decoder,
    requests: Sequence[Request],
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    done: Callable[[int], object] = lambda number: None,
) -> list[Score]:
    """Returns the score of each request, in order. An empty continuation has log-likelihood 0.

    model: in evaluation mode. All rows of its head get probability, as in training and in lm-eval's wrapper.
    tokens_at_once: maximum length of a packed row; a longer request is a separate row. done: called with the number of
    requests scored since its last call.

    Raises ValueError for a request without a context, and FloatingPointError if logits are not finite.
    """
    if not all(request.context for request in requests):
        raise ValueError("A request has an empty context; begin it with the end token.")
    times = Counter(requests)
    scores = {request: Score(0.0, True) for request in times if not request.continuation}
    done(sum(times[request] for request in scores))
    # The model reads each input once. Equal requests have the same input, and so have one-token answers to one context.
    of_input: dict[Tokens, list[Request]] = {}
    for request in times:
        if request.continuation:
            of_input.setdefault(request.read, []).append(request)
    for read, start, x in _read_all(model, list(of_input), _shared_contexts(of_input), tokens_at_once):
        for request in of_input[read]:
            scores[request] = _score(model, x[len(request.context) - 1 - start :], request.continuation)
            done(times[request])
    return [scores[request] for request in requests]


def token_log_likelihoods(model: Decoder, x: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs the head on x [T, dim] in pieces of t tokens, to bound its memory.

    Yields for each piece the log-likelihoods of targets int64 [T], float64 [t], and the likeliest tokens, int64 [t].
    Raises FloatingPointError if logits are not finite.
    """
    size = max(1, LOGITS_AT_ONCE // model.spec.vocab_size)
    for piece, target in zip(x.split(size), targets.split(size), strict=True):
        logits = model.run_head(piece[None])[0].double()
        if not logits.isfinite().all():
            raise FloatingPointError(
                "The model's logits are not finite: its weights are damaged or its dtype is too narrow."
            )
        yield logits.log_softmax(-1).gather(1, target[:, None])[:, 0], logits.argmax(-1)


def _score(model: Decoder, x: Tensor, continuation: Tokens) -> Score:
    targets = torch.tensor(continuation, device=x.device)
    pieces = list(token_log_likelihoods(model, x, targets))
    log_likelihood = torch.cat([piece for piece, _ in pieces]).sum()
    return Score(float(log_likelihood), torch.equal(torch.cat([likeliest for _, likeliest in pieces]), targets))


def _shared_contexts(of_input: dict[Tokens, list[Request]]) -> dict[Tokens, list[Tokens]]:
    """The contexts that are worth reading separately, each with the inputs that begin with it."""
    inputs_of: dict[Tokens, list[Tokens]] = {}
    for read, alike in of_input.items():
        # Requests with equal inputs may have contexts of different lengths: take the shortest.
        inputs_of.setdefault(min((request.context for request in alike), key=len), []).append(read)
    return {context: inputs for context, inputs in inputs_of.items() if (len(inputs) - 1) * len(context) >= MIN_SAVED}


def _read_all(
    model: Decoder, inputs: list[Tokens], shared: dict[Tokens, list[Tokens]], tokens_at_once: int
) -> Iterator[tuple[Tokens, int, Tensor]]:
    """Yields each input, in any order, with a position `start` and the head's inputs from there, [T - start, dim]."""
    for context, continued in shared.items():
        yield from _read_after(model, context, continued, tokens_at_once)
    rest = set(inputs).difference(*shared.values())
    row: list[Tokens] = []
    # The longest first, so that a lack of memory appears at the start.
    for read in sorted(rest, key=lambda read: (-len(read), read)):
        if row and sum(map(len, row)) + len(read) > tokens_at_once:
            yield from _read_packed(model, row)
            row = []
        row.append(read)
    if row:
        yield from _read_packed(model, row)


def _read_packed(model: Decoder, row: list[Tokens]) -> Iterator[tuple[Tokens, int, Tensor]]:
    device, lengths = model.embedding.weight.device, [len(read) for read in row]
    tokens = torch.tensor([[token for read in row for token in read]], device=device)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()[None]
    microbatch = describe(tokens, bounds, None, None, model.span, tells_padding=False)
    x, _ = model.run_blocks(model.embed(microbatch.tokens), microbatch.sequence)
    for read, part in zip(row, x[0].split(lengths), strict=True):
        yield read, 0, part


def _read_after(
    model: Decoder, context: Tokens, continued: list[Tokens], tokens_at_once: int
) -> Iterator[tuple[Tokens, int, Tensor]]:
    """Like `_read_all`, for inputs that begin with `context`: equal lengths together, from copies of its state."""
    device = model.embedding.weight.device
    cache = new_cache(model, 1, max(map(len, continued)))
    for x in read_pieces(model, cache, torch.tensor([context], device=device)):
        last = x[:, -1:]
    for length, group in groupby(sorted(continued, key=len), key=len):
        # The copies of the state may have a place for each token, so their tokens are counted too.
        most = min(tokens_at_once // max(1, length - len(context)), COPIED * tokens_at_once // length)
        for inputs in _batched(group, max(1, most)):
            parts = [last.expand(len(inputs), -1, -1)]
            if length > len(context):
                tokens = torch.tensor([read[len(context) :] for read in inputs], device=device)
                forked = cache[torch.zeros(len(inputs), dtype=torch.int64, device=device)]
                parts += read_pieces(model, forked, tokens)
            for read, x in zip(inputs, torch.cat(parts, 1), strict=True):
                yield read, len(context) - 1, x


def _batched(items: Iterable[Tokens], number: int) -> Iterator[list[Tokens]]:
    """Lists of `number` items; the last may be shorter. Python 3.12 has it in itertools."""
    iterator = iter(items)
    while batch := list(islice(iterator, number)):
        yield batch
