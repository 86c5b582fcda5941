"""Computes bits per byte and perplexity of text files, exact to the byte.

A file is one document: the end token (for a transformers model its begin token, if it has one), then the tokens of
the whole file, each predicted from earlier tokens. The sum of their log-likelihoods is divided by the number of bytes
on disk, so figures of models with different tokenizers can be compared. The end token after the document is not
counted, since it stands for no byte.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum, inf, log
from pathlib import Path
from typing import Any

import torch

from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.evaluation.scores import Request, score, token_log_likelihoods
from torchlmoe.files import read_small
from torchlmoe.inference.cache import growing, new_cache, read_pieces
from torchlmoe.model.decoder import Decoder

MAX_BYTES = 2**30
MAX_FLOAT = sys.float_info.max
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """A file's size in bytes and its tokens."""

    num_bytes: int
    tokens: list[int]


def read_text(path: Path, tokenizer: Tokenizer) -> Text:
    """Reads and tokenizes a file.

    Raises ValueError, naming the file, if it is missing, empty, larger than MAX_BYTES or not UTF-8, or has no tokens.
    """
    try:
        content = read_small(path, MAX_BYTES)
        if not content:
            raise ValueError(f"{path} is empty: there is no byte to count")
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}.") from None
    except ValueError as error:
        raise ValueError(f"{error}.") from None
    (tokens,) = tokenizer.encode_batch([text])
    if not tokens:
        raise ValueError(f"{path} gives no tokens; use a tokenizer that keeps all of a text.")
    if tokenizer.decode(tokens) != text:
        logger.warning(f"The tokenizer does not keep all of {path}: its figure counts the kept text, over all bytes.")
    return Text(len(content), tokens)


def score_text(
    model: Decoder, text: Text, tokenizer: Tokenizer, max_length: int | None = None, begin_id: int | None = None
) -> dict[str, float | int]:
    """Returns bits_per_byte, perplexity (per token), num_bytes and num_tokens of a text.

    max_length: None carries the state through the whole file, so each token is predicted from all tokens before it. A
    number cuts the text into windows of that many predicted tokens, each beginning with the last token of the window
    before it, as in lm-eval. Models with softmax attention need it, since their memory grows with the text.
    begin_id: the token before the text; the end token if None.
    Raises FloatingPointError if logits are not finite.
    """
    tokens = [tokenizer.end_id if begin_id is None else begin_id, *text.tokens]
    if max_length is None:
        log_likelihood = _log_likelihood(model, tokens)
    else:
        windows = [
            Request((tokens[start],), tuple(tokens[start + 1 : start + max_length + 1]))
            for start in range(0, len(text.tokens), max_length)
        ]
        log_likelihood = fsum(entry.log_likelihood for entry in score(model, windows))
    per_token = -log_likelihood / len(text.tokens)
    return {
        "bits_per_byte": -log_likelihood / log(2) / text.num_bytes,
        "perplexity": exp(per_token) if per_token < log(MAX_FLOAT) else inf,
        "num_bytes": text.num_bytes,
        "num_tokens": len(text.tokens),
    }


@torch.inference_mode()
def _log_likelihood(model: Decoder, tokens: list[int]) -> float:
    """Log-likelihood of all tokens but the first, which begins the document; a float64 sum."""
    device = model.embedding.weight.device
    cache = new_cache(model, 1, len(tokens))
    targets = torch.tensor(tokens[1:], device=device)
    sums = []
    for x in read_pieces(model, cache, torch.tensor([tokens[:-1]], device=device)):
        here, targets = targets[: x.shape[1]], targets[x.shape[1] :]
        sums += [float(piece.sum()) for piece, _ in token_log_likelihoods(model, x[0], here)]
    return fsum(sums)


def evaluate_texts(
    model: Decoder,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    *,
    max_length: int | None,
    trained_length: int,
    begin_id: int | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Scores each file. Returns path -> figures of `score_text`, or {"error": sentence}; and the list of errors.

    max_length: see `score_text`; if None, a model whose memory grows with the text uses `trained_length`.
    begin_id: see `score_text`.
    """
    if max_length is None and growing(model):
        max_length = trained_length
    figures: dict[str, dict[str, Any]] = {}
    refused = []
    for path in paths:
        try:
            figures[str(path)] = score_text(model, read_text(path, tokenizer), tokenizer, max_length, begin_id)
        except (ValueError, OSError) as error:
            refused.append(str(error) if isinstance(error, ValueError) else f"{path}: {error.strerror}.")
            figures[str(path)] = {"error": refused[-1]}
    return figures, refused
