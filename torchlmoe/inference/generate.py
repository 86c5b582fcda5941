"""Continues prompts token by token, from recurrent states and key-value caches.

Prompts of one length are read together into their rows of the cache, PIECE tokens at a time; those of another length
apart from them, because padding would enter the recurrent states. From then on all rows go together, one token a step,
each at its own position. The blocks with a recurrence hold the same memory however far that is.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.inference.sampling import Sampling, next_token_distribution
from torchlmoe.model.decoder import Decoder

PIECE = 512  # bounds the activations and the attention mask of a long prompt


def generate(model: Decoder, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
    """The continuation of each prompt; arguments as in `generate_stepwise`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    for step in generate_stepwise(model, prompts, **options):
        for continuation, token in zip(continuations, step, strict=True):
            if token is not None:
                continuation.append(token)
    return continuations


@torch.inference_mode()
def generate_stepwise(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_id: int | None = None,
    vocab_size: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Yields step by step the next token of each prompt, None for those that have ended, until all have.

    model: put into evaluation mode, where experts drop nothing and count nothing.
    prompts: token ids, of any lengths; the first of a document is the end token, as in training.
    end_id: the token that ends a row, and is not part of it; None to go on to max_new_tokens.
    vocab_size: ids that the tokenizer has, where the embedding has more rows: the others are never chosen.
    sampling: greedy unless given. seed: of its draws; one seed gives the same tokens for the same prompts.

    Raises ValueError for prompts without tokens or with ids that there are not, and for max_new_tokens < 1.
    """
    vocab_size = vocab_size or model.embedding.num_embeddings
    if vocab_size > model.embedding.num_embeddings:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens, but the model only {model.embedding.num_embeddings} rows of its "
            "embedding; use the tokenizer that it was trained with."
        )
    _check(prompts, max_new_tokens, vocab_size)
    model.eval()
    sampling = sampling or Sampling(temperature=0)
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    # Sorted by length, so that prompts of one length are a slice of the cache.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    lengths = torch.tensor([len(prompts[index]) for index in order], device=device)
    cache = model.init_cache(len(order), int(lengths[-1]) + max_new_tokens)
    seen = torch.zeros(len(order), vocab_size, dtype=torch.bool, device=device)
    logits_of_groups, start = [], 0
    for _, group in groupby(order, key=lambda index: len(prompts[index])):
        tokens = torch.tensor([list(prompts[index]) for index in group], device=device)
        rows = slice(start, start + len(tokens))
        seen[rows].scatter_(1, tokens, True)
        logits_of_groups.append(_read_prompts(model, tokens, cache[rows]))
        start = rows.stop
    logits = torch.cat(logits_of_groups)
    if end_id is not None:
        seen[:, end_id] = False  # it begins every document; to end one is no repetition

    ended = [False] * len(order)
    for step in range(max_new_tokens):
        if step:
            logits = model.next_logits(tokens, lengths[:, None] + step - 1, cache)
        distribution = next_token_distribution(logits[:, :vocab_size], sampling, seen)
        tokens = torch.multinomial(distribution, 1, generator=generator)
        seen.scatter_(1, tokens, True)
        chosen: list[int | None] = [None] * len(order)
        for row, token in enumerate(tokens[:, 0].tolist()):
            ended[row] = ended[row] or token == end_id
            chosen[order[row]] = None if ended[row] else token
        if all(ended):
            return
        yield chosen


def _read_prompts(model: Decoder, tokens: Tensor, cache: TensorDict) -> Tensor:
    """tokens int64 [B, T] -> logits [B, V] of the last, read from position 0."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    for piece, places in zip(tokens.split(PIECE, 1), positions.split(PIECE, 1), strict=True):
        logits = model.next_logits(piece, places, cache)
    return logits


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} must be at least 1.")
    if not prompts:
        raise ValueError("There is no prompt to continue; give at least one.")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Prompt {index} has no tokens; begin it with the end token, as in training.")
        low, high = min(prompt), max(prompt)
        if not 0 <= low <= high < vocab_size:
            raise ValueError(f"Prompt {index} has token ids from {low} to {high}, but there are {vocab_size} tokens.")
