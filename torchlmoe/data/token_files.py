"""Reads token files of other programs without copying them: uint16 or uint32, one document after another.

The files beside a token file decide its format:

    x.bin, x.idx       Megatron-LM's indexed dataset: the index has the dtype and the documents (megatron/core/datasets/
                       indexed_dataset.py); documents may end with the end token (--append-eod) or not
    x.npy, x.csv.gz    OLMo-core's and dolma's (OLMo-core, src/olmo_core/data/utils.py): numbers without a header in
                       spite of the name, and lines of start,end,...; documents end with the end token
    x.bin or x.npy     nanoGPT's (data/openwebtext/prepare.py), and the formats above without their index: documents end
                       with the end token; files of numpy.save, with their header, are read too

A store of such files has only the starts of documents and the identity of the whole.
"""

import gzip
import hashlib
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from torchlmoe.data.corpus import Corpus
from torchlmoe.data.store import Shard, StoreIndex, TokenStore
from torchlmoe.data.store_writer import token_dtype, update_digest
from torchlmoe.data.tokenizer import Tokenizer

TOKENS_AT_ONCE = 2**24
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, number of sequences, number of documents plus one
MEGATRON_TYPES = {4: "<u4", 8: "<u2"}  # int32, which is never negative here, and uint16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens.

    offset: bytes before the tokens. bounds: int64, the starts of documents and the end of the last, from an index; None
    without an index.
    """

    path: Path
    dtype: str
    num_tokens: int
    offset: int = 0
    bounds: np.ndarray | None = None

    def tokens(self) -> np.ndarray:
        """The tokens, memory-mapped."""
        return np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=(self.num_tokens,))

    def documents(self, end_id: int) -> np.ndarray:
        """`bounds` or, without an index, bounds after each end token."""
        if self.bounds is not None:
            return self.bounds
        tokens = self.tokens()
        ends = [
            np.flatnonzero(tokens[start : start + TOKENS_AT_ONCE] == end_id) + start + 1
            for start in range(0, self.num_tokens, TOKENS_AT_ONCE)
        ]
        return np.unique(np.concatenate([[0], *ends, [self.num_tokens]]).astype(np.int64))


def index_token_files(
    folder: Path, corpus: Corpus, split: str, tokenizer: Tokenizer, recipe: dict, max_tokens: int | None
) -> TokenStore:
    """Makes a store at `folder` whose shards are the corpus's files. Reads them once, to identify the store.

    max_tokens: maximum number of tokens in the store; None for all.
    Raises ValueError for a file in none of the formats above, an index that does not match its file, and tokens that
    are not the tokenizer's.
    """
    assert corpus.token_files is not None
    end_id, dtype = tokenizer.end_id, corpus.token_dtype or token_dtype(tokenizer.vocab_size)
    files = [open_token_file(path, dtype, is_given=corpus.token_dtype is not None) for path in corpus.token_files]
    logger.info(f"Reading {sum(file.num_tokens for file in files):,} tokens of {corpus.name} once, to identify them.")
    bounds = [file.documents(end_id) for file in files]
    end_tokens = _end_tokens(files, bounds, tokenizer)
    firsts = np.cumsum([0, *(file.num_tokens for file in files)])
    starts = np.concatenate([[0], *(of_file[1:] + first for of_file, first in zip(bounds, firsts, strict=False))])
    if end_tokens == "none":
        starts = starts + np.arange(len(starts))
    elif files[-1].tokens()[-1] != end_id:  # the last document lacks its end token, which the stream has in front
        starts[-1] += 1
    if max_tokens is not None and max_tokens < starts[-1]:
        starts = np.append(starts[starts < max_tokens], max_tokens)

    token_bytes = tokenizer.token_bytes()
    index = StoreIndex(
        recipe=recipe,
        vocab_size=tokenizer.vocab_size,
        end_id=end_id,
        num_tokens=int(starts[-1]),
        num_documents=len(starts) - 1,
        text_bytes=0,
        has_token_bytes=token_bytes is not None,
        content="",
        shards=[Shard(str(file.path.resolve()), file.num_tokens, file.dtype, file.offset) for file in files],
        end_tokens=end_tokens,
    )
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    starts.astype("<i8").tofile(partial / "documents.bin")
    if token_bytes is not None:
        token_bytes.astype("<u2").tofile(partial / "token_bytes.bin")
    (partial / "index.json").write_text(index.to_json())
    content, text_bytes = _identified(TokenStore(partial), tokenizer, split)
    (partial / "index.json").write_text(replace(index, content=content, text_bytes=text_bytes).to_json())
    partial.rename(folder)
    return TokenStore(folder)


def open_token_file(path: Path, dtype: str, *, is_given: bool = False) -> TokenFile:
    """Opens a file of tokens, with its index if there is one.

    dtype: of a file without a header or index. is_given: whether the user chose it, not the size of the vocabulary.
    Raises ValueError for a file in no known format, and for an index that does not match it.
    """
    size = path.stat().st_size
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        return _with_megatron_index(path, size)
    file = _with_numpy_header(path) or TokenFile(path, dtype, size // np.dtype(dtype).itemsize)
    width = np.dtype(file.dtype).itemsize
    if size == 0 or size != file.offset + file.num_tokens * width:
        raise ValueError(
            f"{path} has {size:,} bytes, which is not a multiple of {width} bytes per token: set data.token_dtype, "
            "or give the whole file."
        )
    if file.dtype == "<u2" and not file.offset and not is_given and not file.tokens()[1:4096:2].any() and size > 4:
        raise ValueError(f"{path} is read as uint16 but looks like uint32: set data.token_dtype.")
    return _with_line_index(file)


def _with_numpy_header(path: Path) -> TokenFile | None:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            return None
    try:
        tokens = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if tokens.ndim != 1 or tokens.dtype.str not in ("<u2", "<u4"):
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}: give one row of uint16 or uint32.")
    return TokenFile(path, tokens.dtype.str, len(tokens), tokens.offset)


def _with_megatron_index(path: Path, size: int) -> TokenFile:
    index = path.with_suffix(".idx")
    content = np.memmap(index, np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
    if len(content) < MEGATRON_HEADER.size or bytes(content[:9]) != MEGATRON_MAGIC:
        raise ValueError(f"{index} is not an index of Megatron-LM: give the one that was written with {path.name}.")
    _, version, code, num_sequences, num_bounds = MEGATRON_HEADER.unpack(bytes(content[: MEGATRON_HEADER.size]))
    if version != 1 or code not in MEGATRON_TYPES:
        raise ValueError(f"{index} has version {version} and type {code}: version 1 with uint16 or int32 is read.")
    at_pointers = MEGATRON_HEADER.size + 4 * num_sequences
    at_bounds = at_pointers + 8 * num_sequences
    if len(content) < at_bounds + 8 * num_bounds:
        raise _no_match(index, path, f"is cut short: it announces {num_sequences:,} sequences")
    lengths = np.frombuffer(content, "<i4", num_sequences, MEGATRON_HEADER.size).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", num_sequences, at_pointers)
    of_documents = np.frombuffer(content, "<i8", num_bounds, at_bounds)
    firsts = np.cumsum(np.concatenate([[0], lengths]))
    dtype = MEGATRON_TYPES[code]
    width = np.dtype(dtype).itemsize
    if firsts[-1] * width != size:
        raise _no_match(index, path, f"counts {firsts[-1]:,} tokens of {width} bytes, but the file has {size:,} bytes")
    if (lengths < 0).any() or (pointers != firsts[:-1] * width).any():
        raise _no_match(index, path, "does not place its sequences one after another")
    whole = num_bounds > 1 and of_documents[0] == 0 and of_documents[-1] == num_sequences
    if not whole or (np.diff(of_documents) < 0).any() or not size:
        raise _no_match(index, path, "has documents that do not cover its sequences in order")
    return TokenFile(path, dtype, int(firsts[-1]), bounds=np.unique(firsts[of_documents]))


def _with_line_index(file: TokenFile) -> TokenFile:
    index = file.path.with_suffix(".csv.gz")
    if not index.is_file():
        return file
    try:
        with gzip.open(index, "rt") as lines:
            pairs = np.array([[int(part) for part in line.split(",")[:2]] for line in lines], dtype=np.int64)
        starts, stops = pairs.reshape(-1, 2).T
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{index} cannot be read: {error}: give lines that begin with start,end.") from None
    bounds = np.concatenate([[0], stops])
    if (starts != bounds[:-1]).any() or (np.diff(bounds) < 0).any() or bounds[-1] != file.num_tokens:
        raise _no_match(index, file.path, f"covers {bounds[-1]:,} consecutive tokens, not {file.num_tokens:,}")
    return replace(file, bounds=np.unique(bounds))


def _no_match(index: Path, path: Path, problem: str) -> ValueError:
    return ValueError(f"{index} does not match {path.name}: it {problem}; give the index that was written with it.")


def _end_tokens(files: list[TokenFile], bounds: list[np.ndarray], tokenizer: Tokenizer) -> Literal["last", "none"]:
    """Whether documents end with the end token. Only the last document of the last file may lack it."""
    kinds = set[str]()
    for file, of_file in zip(files, bounds, strict=True):
        ended = file.tokens()[of_file[1:] - 1] == tokenizer.end_id
        if file is files[-1] and len(ended) > 1 and not ended[-1] and ended[:-1].all():
            ended = ended[:-1]
        kinds |= {"last" if end else "none" for end in set(ended.tolist())}
        if file.bounds is None and len(files) > 1 and file is not files[-1] and not ended[-1]:
            raise ValueError(
                f"{file.path} does not end with the end token {tokenizer.end_token!r} ({tokenizer.end_id}): set "
                "data.tokenizer and data.end_token to those that it was written with."
            )
    if len(kinds) > 1:
        raise ValueError(
            f"{files[0].path.parent} has documents with and without the end token {tokenizer.end_token!r} "
            f"({tokenizer.end_id}) at their end: set data.tokenizer and data.end_token to those of its writer."
        )
    is_one_document = files[-1].bounds is None and kinds == {"none"}  # a file without any end token
    return "last" if is_one_document or kinds == {"last"} else "none"


def _identified(store: TokenStore, tokenizer: Tokenizer, split: str) -> tuple[str, int]:
    """The identity of the documents, the same as if they were tokenized here, and the UTF-8 bytes of their text.

    Only validation needs the bytes. It decodes the tokens if the tokenizer does not know the bytes of each token.
    """
    dtype = token_dtype(store.vocab_size)
    digest = hashlib.sha256(f"{dtype} {store.vocab_size} {store.end_id}".encode())
    text_bytes = 0

    def read(start: int, stop: int) -> np.ndarray:
        nonlocal text_bytes
        tokens = store.tokens(start, stop)
        if store.token_bytes is not None:
            text_bytes += int(store.token_bytes[tokens].sum(dtype=np.int64))
        return tokens.astype(dtype)

    update_digest(digest, read, np.diff(store.document_starts), dtype)
    if store.token_bytes is None and split == "validation":
        text_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in _documents(store))
    return digest.hexdigest(), text_bytes


def _documents(store: TokenStore) -> Iterator[list[int]]:
    starts = store.document_starts
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        yield store.tokens(int(start) + 1, int(stop)).tolist()
