"""What is streamed adds up to the decoded whole, never splits a character, and keeps the order of the prompts."""

import copy
import random

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from torchlmoe.data.tokenizer import load_tokenizer
from torchlmoe.inference.text_stream import TextStream, stream_in_order

TEXT = "naïve — “café” 日本語 🙂👩‍👩‍👧 Ωmega"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def test_multi_byte_characters_come_whole(tokenizer):
    stream = TextStream(tokenizer)
    (ids,) = tokenizer.encode_batch([TEXT])
    pieces = [stream.push(index) for index in ids]
    assert len(ids) > len(TEXT) > 30  # characters of several tokens
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert stream.close() == ""


def test_any_ids_add_up_to_the_whole(tokenizer):
    """Single bytes in any order, valid UTF-8 or not, and any tokens, end tokens among them."""
    draw = random.Random(0)
    for pool in (range(tokenizer.vocab_size), range(300)):
        for _ in range(50):
            ids = [draw.choice(pool) for _ in range(40)]
            stream = TextStream(tokenizer)
            assert "".join(map(stream.push, ids)) + stream.close() == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def byte_fallback():
    """As the tokenizers of Llama and Mistral: a space is part of a word, the first one is dropped, and what has no
    token is spelled in bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁aeinot", "▁a", "▁to", "▁to▁a"]
    raw = RawTokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = copy.copy(load_tokenizer("embedded"))
    tokenizer._tokenizer, tokenizer.vocab_size = raw, len(pieces)
    return tokenizer


@pytest.mark.parametrize("window", [1, 3, 64])
def test_byte_fallback_adds_up_to_the_whole(byte_fallback, window):
    draw = random.Random(0)
    text = [2 + byte for byte in TEXT.encode()]
    for pool in (range(byte_fallback.vocab_size), range(258, byte_fallback.vocab_size)):
        for _ in range(20):
            ids = text + [draw.choice(pool) for _ in range(40)] + text
            stream = TextStream(byte_fallback, window)
            pieces = [stream.push(index) for index in ids]
            assert "".join(pieces) + stream.close() == byte_fallback.decode(ids)


def test_an_unfinished_character_comes_last(tokenizer):
    stream = TextStream(tokenizer)
    (ids,) = tokenizer.encode_batch(["a🙂"])
    assert "".join(map(stream.push, ids[:-1])) == "a"
    assert stream.close() == "\ufffd"


def test_rows_come_one_after_another(tokenizer):
    prompts = tokenizer.encode_batch(["One", "Two 🙂", "Three"])
    continuations = tokenizer.encode_batch([" 日本", "", " and so on, a good deal longer"])
    longest = max(map(len, continuations))
    steps = list(zip(*(row + [None] * (longest - len(row)) for row in continuations), strict=True))
    found = list(stream_in_order(tokenizer, prompts, steps))
    assert found[0] == (0, "One")
    assert [row for row, _ in found] == sorted(row for row, _ in found)
    texts = ["".join(text for index, text in found if index == row) for row in range(3)]
    assert texts == ["One 日本", "Two 🙂", "Three and so on, a good deal longer"]
    # The last row is shown as it grows, not at the end.
    assert sum(row == 2 for row, _ in found) > longest - len(continuations[0])


def test_the_prompt_is_there_before_the_first_step(tokenizer):
    prompts = tokenizer.encode_batch(["One"])
    assert next(stream_in_order(tokenizer, prompts, iter(()))) == (0, "One")
