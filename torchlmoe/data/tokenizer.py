"""Converts text to token ids and ids to text: a thin wrapper of `tokenizers.Tokenizer` that knows its end token."""

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

MOST_TOKENS = 2**24  # in a vocabulary; the largest in use have 2**18
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>")


class Tokenizer:
    """A tokenizer.json and its end token, which separates documents.

    path: the tokenizer.json.
    end_token: the end token; None takes the first of END_TOKENS that the vocabulary has.
    content: of the file; None reads it.

    Attributes: `vocab_size` (the largest id plus one), `end_token`, `end_id`, `content` (of the file), `fingerprint`
    (its sha256).
    Raises ValueError for a file that is not a valid tokenizer, and for an end token that the vocabulary lacks.
    """

    def __init__(self, path: Path, end_token: str | None = None, content: bytes | None = None):
        self.path, self.content = path, path.read_bytes() if content is None else content
        self.fingerprint = hashlib.sha256(self.content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.content)
        except ValueError as error:
            raise ValueError(
                f"{path} is not a tokenizer.json that this version of `tokenizers` reads: {error}."
            ) from error
        # A tokenizer.json may have the truncation and padding of the program that saved it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Documents that contain "<|endoftext|>" as text do not end there.
        self._tokenizer.encode_special_tokens = True

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > MOST_TOKENS:
            raise ValueError(
                f"{path} has a token with the id {self.vocab_size - 1}; the largest supported id is {MOST_TOKENS - 1}."
            )
        candidates = END_TOKENS if end_token is None else (end_token,)
        available = [token for token in candidates if token in vocabulary]
        if not available:
            raise ValueError(
                f"The vocabulary of {path} has no end token {' or '.join(candidates)}: "
                "set data.end_token to one that it has."
            )
        self.end_token = available[0]
        self.end_id = vocabulary[self.end_token]

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path, str, bytes]]:
        return Tokenizer, (self.path, self.end_token, self.content)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """One list of ids per text, without special tokens. Runs on several threads."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def added_before(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer.json itself adds before a text, as Llama's does; often none."""
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        text_begins = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
        return tuple(encoding.ids[:text_begins])

    def id_of(self, token: str) -> int | None:
        """The id of a token; None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def is_byte(self, index: int) -> bool:
        """Whether a token is a single byte, in a tokenizer with byte fallback such as Llama's.

        The tokenizer decodes consecutive bytes together, and one invalid byte makes all of them U+FFFD.
        """
        return re.fullmatch("<0x[0-9A-F]{2}>", self._tokenizer.id_to_token(index) or "") is not None

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes of text in each token, uint16 [vocab_size]; None unless this is byte-level BPE.

        Special tokens and the end token have no text. If a normalizer changes text, these are bytes of its result.
        """
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> np.ndarray | None:
        added = self._tokenizer.get_added_tokens_decoder()
        table = np.zeros(self.vocab_size, dtype=np.uint16)
        alphabet = set(ByteLevel.alphabet())
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in added:
                table[index] = 0 if added[index].special else len(token.encode())
            elif alphabet.issuperset(token):
                table[index] = len(token)  # byte-level BPE writes every byte as one character
            else:
                return None
        table[self.end_id] = 0  # not every tokenizer marks its end token as special
        return table

    def dropped_characters(self, text: str) -> list[str]:
        """The characters of `text` that no token covers, except white space."""
        covered = np.zeros(len(text) + 1, dtype=bool)
        for start, end in self._tokenizer.encode(text, add_special_tokens=False).offsets:
            covered[start:end] = True
        return [text[place] for place in np.flatnonzero(~covered[:-1]) if not text[place].isspace()]

    def bytes_covered(self, text: str, num_tokens: int) -> int:
        """UTF-8 bytes of the part of `text` that its first `num_tokens` tokens cover, in whole characters."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        end = encoding.offsets[num_tokens - 1][1] if num_tokens else 0
        return len(text[:end].encode())


def token_of_id(path: Path, index: int) -> str:
    """The token with an id in a tokenizer.json. Raises ValueError if there is none."""
    try:
        token = tokenizers.Tokenizer.from_file(str(path)).id_to_token(index)
    except Exception as error:  # `tokenizers` documents no types of errors
        raise ValueError(f"{path} is not a tokenizer.json that this version of `tokenizers` reads: {error}.") from error
    if token is None:
        raise ValueError(f"{path} has no token with the id {index}, which should end documents.")
    return token


def number_tokenizer(vocab_size: int, end_id: int) -> Tokenizer:
    """A tokenizer for a model without one: text consists of token ids, so "17 3" has the tokens 17 and 3."""
    model = tokenizers.models.WordLevel({str(index): index for index in range(vocab_size)})
    numbers = tokenizers.Tokenizer(model)
    numbers.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(Path("tokenizer.json"), str(end_id), numbers.to_str().encode())


def load_tokenizer(name_or_path: str | Path, end_token: str | None = None) -> Tokenizer:
    """Loads the tokenizer "embedded" (byte-level BPE, 4096 tokens), a tokenizer.json, or the one in a folder.

    end_token: see `Tokenizer`. Raises ValueError if the file does not exist or is not a tokenizer.
    """
    if str(name_or_path) == "embedded":
        return Tokenizer(Path(str(files("torchlmoe.assets") / "tokenizer.json")), end_token)
    if not str(name_or_path):
        raise ValueError('data.tokenizer is empty: give "embedded", a tokenizer.json or a folder.')
    path = Path(name_or_path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f'data.tokenizer = "{name_or_path}" does not exist: give "embedded", a tokenizer.json or a folder.'
        )
    return Tokenizer(path, end_token)
