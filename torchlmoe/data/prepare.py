"""Tokenizes one split of a dataset into a token store, once: later runs and other processes find it there."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout

from torchlmoe.data.corpus import Corpus, open_corpus
from torchlmoe.data.progress import TokenizationProgress
from torchlmoe.data.store import StoreWriter, TokenStore
from torchlmoe.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Part of every store's name: raise it when the same recipe would be written differently.
FORMAT = 2
# Enough to keep the tokenizer's threads busy, little enough for memory and for a progress line that moves.
CHARACTERS_AT_ONCE = 2**22
# Of every batch, what is looked at for text that the tokenizer drops.
CHARACTERS_LOOKED_AT = 2**17
NAME_BYTES = 100  # of a store's folder, from the dataset's name; file systems take 255 in all


def prepare(
    dataset: str,
    split: str,
    *,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    dataset_config: str | None = None,
    text_column: str = "text",
    train_split: str = "train",
    validation_split: str = "validation",
    validation_dataset: str | None = None,
    validation_fraction: float = 0.01,
    reader_options: dict[str, Any] | None = None,
    max_tokens: int | None = None,
) -> TokenStore:
    """The token store of one split, "train" or "validation", built if `cache_dir` does not have it yet.

    Its folder is named by a hash of all that it depends on: the dataset (local files by path, size and times
    of change), the tokenizer, `max_tokens` and the options. Of several processes one builds, the others wait.

    max_tokens: stop there, within a document if need be; end tokens count. None takes all.
    The dataset's options are those of corpus.open_corpus. Documents without text are left out.
    Raises ValueError where the dataset is not there or has no text.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens = {max_tokens} leaves no text to read: give at least 2.")
    corpus = open_corpus(
        dataset,
        split,
        dataset_config=dataset_config,
        text_column=text_column,
        train_split=train_split,
        validation_split=validation_split,
        validation_dataset=validation_dataset,
        validation_fraction=validation_fraction,
        reader_options=reader_options,
    )
    recipe = {
        "format": FORMAT,
        "corpus": corpus.identity,
        "tokenizer": tokenizer.fingerprint,
        "end_token": tokenizer.end_token,
        "max_tokens": max_tokens,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    if not str(cache_dir):
        raise ValueError("data.cache_dir is empty: give a folder, or leave it unset.")
    readable = re.sub(r"[^\w.-]+", "-", Path(corpus.name).name).encode()[:NAME_BYTES].decode(errors="ignore")
    folder = Path(cache_dir).expanduser() / f"{readable}-{split}-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if not folder.exists():
                return _build(folder, corpus, split, tokenizer, recipe, max_tokens)
    return TokenStore(folder)


def _lock(folder: Path) -> AcquireReturnProxy:
    """Acquired already, and released at the end of its `with`."""
    lock = FileLock(f"{folder}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"Another process is tokenizing {folder.name}: waiting for it.")
        return lock.acquire()


def _build(
    folder: Path, corpus: Corpus, split: str, tokenizer: Tokenizer, recipe: dict, max_tokens: int | None
) -> TokenStore:
    token_bytes = tokenizer.token_bytes()
    dropped = Counter[str]()
    with (
        StoreWriter(folder, vocab_size=tokenizer.vocab_size, end_id=tokenizer.end_id, recipe=recipe) as writer,
        TokenizationProgress(f"{corpus.name}, {split}") as progress,
    ):
        looked_at = 0
        for text, ids, is_first in _encoded(corpus, tokenizer):
            looked_at = 0 if is_first else looked_at
            text_bytes = len(text.encode())
            # A normalizer may have rewritten the text: only the text itself proves the bytes of its tokens.
            if token_bytes is not None and int(token_bytes[ids].sum()) != text_bytes:
                token_bytes = None
            if token_bytes is None and looked_at < CHARACTERS_LOOKED_AT:
                looked_at += len(text)
                dropped.update(tokenizer.dropped_characters(text))
            room = len(ids) if max_tokens is None else max_tokens - writer.num_tokens - 1
            if room < 0:
                break
            if room < len(ids):
                ids = ids[:room]
                if token_bytes is None:
                    text_bytes = tokenizer.bytes_covered(text, room)
                else:
                    text_bytes = int(token_bytes[ids].sum())
            writer.append(ids, text_bytes)
            progress.update(writer.num_documents, writer.text_bytes, writer.num_tokens)
        if writer.num_documents == 0:
            remedy = "give it some"
            if split == "validation":
                remedy = (
                    "give a data.validation_dataset, set validation.enable = false, or, where there are many "
                    "documents, raise data.validation_fraction"
                )
            raise ValueError(f"The {split} split of {corpus.name} has no documents with text: {remedy}.")
        if dropped:
            examples = ", ".join(repr(character) for character, _ in dropped.most_common(5))
            logger.warning(
                f"The tokenizer has no token for some characters of {corpus.name}, such as {examples}, and drops them: "
                "the model never sees this text, and bits per byte are too low by as much as it would have cost."
            )
        return writer.finish(token_bytes)


def _encoded(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Every document that has text, its ids, and whether it is the first of a batch."""
    for texts in _batches(filter(None, corpus.documents())):
        for index, (text, ids) in enumerate(zip(texts, tokenizer.encode_batch(texts), strict=True)):
            yield text, np.array(ids, dtype=np.int64), index == 0


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
