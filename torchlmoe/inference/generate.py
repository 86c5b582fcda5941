"""Continues prompts token by token, from recurrent states and key-value caches.

`inference/prefill.py` reads prompts without padding, and shared prefixes once. Then all rows decode together, one token
per step, each at its own position. A row that ends leaves the batch. A recurrence needs constant memory per row.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from tensordict import TensorDict

from torchlmoe.inference.cache import LENGTH, copy_rows
from torchlmoe.inference.compiled import compile_step
from torchlmoe.inference.prefill import read_prompts
from torchlmoe.inference.sampling import Sampling, draw, next_token_distribution
from torchlmoe.model.decoder import Decoder


def generate(model: Decoder, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
    """Returns the continuation of each prompt, as token ids. Arguments and errors: see `generate_stepwise`."""
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
    end_id: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    has_ended: Callable[[int, int], bool] | None = None,
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """Yields at each step the next token of each prompt, None if the prompt has ended, until all have ended.

    model: put into evaluation mode, where experts drop nothing and count nothing.
    prompts: token ids, of any lengths. A document begins with the end token, as in training.
    end_id: the token that ends a row, and is not part of it, or several; None to continue to max_new_tokens.
    vocab_size: number of the tokenizer's ids, if the embedding has more rows. The other rows are never chosen.
    sampling: greedy if None. seed: of random draws; equal seeds give equal tokens for equal prompts.
    has_ended: called with the index of a prompt and its next token; True ends the row with this token.
    compile: compile the step. This takes minutes once and pays off over many tokens.

    Raises ValueError for no prompts, prompts without tokens or with unknown ids, max_new_tokens < 1, a seed below 0 or
    above 2^63 - 1, and a vocab_size above the number of the embedding's rows; FloatingPointError if logits are not
    finite.
    """
    vocab_size = vocab_size or model.embedding.num_embeddings
    if vocab_size > model.embedding.num_embeddings:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens, but the model only {model.embedding.num_embeddings} rows of its "
            "embedding; use the tokenizer that it was trained with."
        )
    _check(prompts, max_new_tokens, vocab_size, seed)
    model.eval()
    next_logits = compile_step(model.next_logits) if compile else model.next_logits
    sampling = sampling or Sampling(temperature=0)
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache, logits = read_prompts(model, prompts, max(map(len, prompts)) + max_new_tokens)
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=device)] = True
    end_ids = [] if end_id is None else [end_id] if isinstance(end_id, int) else list(end_id)
    for index in end_ids:
        seen[:, index : index + 1] = False  # a document begins with it, so ending one is not a repetition

    live = list(range(len(prompts)))  # the prompt of each row of the cache
    for step in range(max_new_tokens):
        distribution = next_token_distribution(logits[:, :vocab_size], sampling, seen)
        # One number for every prompt, so that a row's draws do not depend on when others end.
        uniform = torch.rand(len(prompts), dtype=torch.float64, device=device, generator=generator)
        tokens = draw(distribution, uniform[live])[:, None]
        seen.scatter_(1, tokens, True)
        chosen: list[int | None] = [None] * len(prompts)
        kept_rows = []
        for row, (index, token) in enumerate(zip(live, tokens[:, 0].tolist(), strict=True)):
            if token in end_ids:
                continue
            chosen[index] = token
            if has_ended is None or not has_ended(index, token):
                kept_rows.append(row)
        if any(token is not None for token in chosen):
            yield chosen
        if not kept_rows:
            return
        if len(kept_rows) < len(live):
            cache, order = _keep_rows(cache, kept_rows)
            live = [live[row] for row in order]
            tokens, seen = tokens[order], seen[order]
        if step + 1 < max_new_tokens:
            logits = next_logits(tokens, cache[LENGTH][:, None], cache)
            cache[LENGTH].add_(1)


def _keep_rows(cache: TensorDict, rows: list[int]) -> tuple[TensorDict, list[int]]:
    """Reduces a cache to some rows in place: the last rows fill the gaps. Returns it and the new order of its rows."""
    order = list(range(len(rows)))
    gaps = sorted(set(order) - set(rows))
    moved = [row for row in rows if row >= len(rows)]
    for gap, row in zip(gaps, moved, strict=True):
        order[gap] = row
    copy_rows(cache, moved, cache, gaps)
    return cache[: len(rows)], order


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int, seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed} must be at least 0 and less than 2^63.")
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
