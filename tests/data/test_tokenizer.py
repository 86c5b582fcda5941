"""The embedded tokenizer on arbitrary text, and what other tokenizer.json files may bring along."""

import hashlib
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers

from torchlmoe.data.tokenizer import load_tokenizer

ASSETS = Path(__file__).parents[2] / "assets"

TEXTS = [
    "",
    " ",
    "Call me Ishmael. Some years ago\n\n\tnever mind how long precisely",
    "naïve café \u200b\u2028 Ünïcödé ß ﬁ \U0001d518\U0001d52b 日本語 العربية 👩‍👩‍👧‍👦 e\u0301",
    "".join(chr(i) for i in range(0x800)),
    "".join(chr(i) for i in range(0x800, 0x110000, 97) if not 0xD800 <= i < 0xE000),
    "\r\n\x00\x7f  trailing   ",
    "12345 1,000,000 3.14159",
]


def word_tokenizer(path, words, **options):
    """A tokenizer of whole words, which is not byte-level."""
    ids = words if isinstance(words, dict) else {word: i for i, word in enumerate(words)}
    raw = RawTokenizer(models.WordLevel(ids, unk_token=next(iter(ids))))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.save(str(path))
    return load_tokenizer(path, **options)


@pytest.mark.parametrize("text", TEXTS)
def test_embedded_round_trips_any_text(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_embedded_facts(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.end_token) == (4096, 0, "<|endoftext|>")
    content = (ASSETS / "tokenizer.json").read_bytes()
    assert tokenizer.fingerprint == hashlib.sha256(content).hexdigest()
    table = tokenizer.token_bytes()
    assert table[0] == 0
    assert (table[1:] > 0).all()
    assert (table == 1).sum() == 256


def test_a_spelled_out_end_token_is_text(tokenizer):
    text = "before <|endoftext|> after"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.end_id not in ids
    assert tokenizer.decode([tokenizer.end_id, *ids, tokenizer.end_id]) == text


def test_truncation_and_padding_of_the_file_are_cleared(tokenizer, tmp_path):
    raw = RawTokenizer.from_file(str(ASSETS / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=16)
    raw.save(str(tmp_path / "tokenizer.json"))
    texts = ["a", "a rather longer text than four tokens"]
    expected = [RawTokenizer.from_file(str(ASSETS / "tokenizer.json")).encode(text).ids for text in texts]
    assert load_tokenizer(tmp_path).encode_batch(texts) == expected


def test_end_tokens_are_found_or_named(tmp_path):
    assert word_tokenizer(tmp_path / "a.json", ["x", "</s>", "y"]).end_id == 1
    assert word_tokenizer(tmp_path / "b.json", ["x", "</s>", "<|im_end|>"]).end_token == "<|im_end|>"
    assert word_tokenizer(tmp_path / "c.json", ["x", "</s>", "y"], end_token="y").end_id == 2
    with pytest.raises(ValueError, match=r"no end token <\|endoftext\|> or .*: set data\.end_token"):
        word_tokenizer(tmp_path / "d.json", ["x", "y"])
    with pytest.raises(ValueError, match=r"no end token z: set data\.end_token"):
        word_tokenizer(tmp_path / "e.json", ["x", "y"], end_token="z")


def test_an_end_token_that_is_not_special_stands_for_no_text(tmp_path):
    raw = RawTokenizer.from_file(str(ASSETS / "tokenizer.json"))
    raw.add_tokens(["<|the_end|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, "<|the_end|>")
    assert tokenizer.token_bytes()[tokenizer.end_id] == 0


def test_an_enormous_id_is_refused(tmp_path):
    content = word_tokenizer(tmp_path / "a.json", ["x", "</s>"]).content
    (tmp_path / "b.json").write_bytes(
        content.replace(b'"x": 0', b'"x": 4294967295').replace(b'"x":0', b'"x":4294967295')
    )
    with pytest.raises(ValueError, match=r"has a token with the id 4294967295; the largest supported id is 16777215"):
        load_tokenizer(tmp_path / "b.json")


def test_other_tokenizers_have_no_byte_lengths(tmp_path):
    assert word_tokenizer(tmp_path / "a.json", ["x", "</s>", "日本"]).token_bytes() is None


def test_missing_and_broken_files(tmp_path):
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(ValueError, match='does not exist: give "embedded"'):
            load_tokenizer(path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
