"""What is streamed adds up to the decoded whole, never splits a character, and keeps the order of the prompts."""

import copy
import random

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from torchlmoe.data.tokenizer import load_tokenizer
from torchlmoe.inference.stop_strings import StopStrings
from torchlmoe.inference.text_stream import Row, TextStream, stream_in_order

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


def steps_of(rows, continuations):
    """Like `continue_rows`, with these tokens."""
    longest = max(map(len, continuations), default=0)
    for step in range(longest):
        for row, tokens in zip(rows, continuations, strict=True):
            if step < len(tokens):
                row.push(tokens[step])
            else:
                row.close(longest)
        yield
    for row in rows:
        row.close(longest)
    yield


def test_a_prompt_that_ends_in_bytes_is_whole(byte_fallback):
    """Its last character does not appear in the continuation, whether bytes follow or not."""
    prompt, more = ([2 + byte for byte in text.encode()] for text in ("né", "ñ!"))
    for continuation in (more, [258 + 1], []):
        row = Row(byte_fallback, prompt)
        assert row.prompt_text == "né"
        for token in continuation:
            row.push(token)
        row.close(9)
        assert row.prompt_text + row.text == byte_fallback.decode([*prompt, *continuation])


def test_rows_come_one_after_another(tokenizer):
    rows = [Row(tokenizer, prompt) for prompt in tokenizer.encode_batch(["One", "Two 🙂", "Three"])]
    continuations = tokenizer.encode_batch([" 日本", "", " and so on, a good deal longer"])
    found = list(stream_in_order(rows, steps_of(rows, continuations)))
    assert found[0] == (0, "One")
    assert [row for row, _ in found] == sorted(row for row, _ in found)
    texts = ["".join(text for index, text in found if index == row) for row in range(3)]
    assert texts == ["One 日本", "Two 🙂", "Three and so on, a good deal longer"]
    # The last row is shown as it grows, not at the end.
    assert sum(row == 2 for row, _ in found) > max(map(len, continuations)) - len(continuations[0])


def test_the_prompt_is_there_before_the_first_step(tokenizer):
    (prompt,) = tokenizer.encode_batch(["One"])
    assert next(stream_in_order([Row(tokenizer, prompt)], iter(()))) == (0, "One")


TEXTS = ["naïve — “café” stop here", "日本語 🙂👩‍👩‍👧 STOP", "ababababac and so on", "aaaaab", "END", "no stop at all"]
STOPS = ["stop", "語 🙂", "ababac", "aaab", "END", "E", " so", "👩‍👧", "é”", "\n", "STOP here", "b"]


def test_a_stop_string_is_cut_exactly_and_never_shown(tokenizer, byte_fallback):
    """However tokens split it: merged tokens, single bytes; one stop string, or several of which the first counts."""
    draw = random.Random(0)
    found = 0
    for text in TEXTS:
        (merged,) = tokenizer.encode_batch([text])
        spelled = [2 + byte for byte in text.encode()]
        for ids, reader in ((merged, tokenizer), (spelled, byte_fallback)):
            whole = reader.decode(ids)
            for stops in [[], *([stop] for stop in STOPS), *(draw.sample(STOPS, 3) for _ in range(10))]:
                row, shown = Row(reader, [], stops), [""]
                for token in ids:
                    ended = row.push(token)
                    shown.append(row.text)
                    if ended:
                        break
                row.close(1000)
                places = [whole.find(stop) for stop in stops if stop in whole]
                assert row.text == (whole[: min(places)] if places else whole)
                assert row.finish_reason == ("stop" if places else "end")
                assert all(row.text.startswith(text) for text in shown)
                found += bool(places)
    assert found > 50


def test_an_overlapping_start_is_held_back_and_then_shown():
    stops = StopStrings(["aab"])
    assert [stops.push(letter) for letter in "aaaac"] == ["", "", "a", "a", "aac"]
    assert not stops.found
    assert [stops.push(letter) for letter in "xaab and more"[:5]] == ["x", "", "", "", ""]
    assert stops.found
    assert stops.close() == ""
    with pytest.raises(ValueError, match="A stop string is empty"):
        StopStrings(["a", ""])
