"""Bits per byte against a count of its own, for files of every odd kind; and sentences for those without a figure."""

import logging
import math
import random

import pytest
import torch

from tests.evaluation.conftest import build
from torchlmoe.evaluation.texts import evaluate_texts, read_text, score_text
from torchlmoe.inference import cache as caches

PIECES = ["a", "\r\n", "\n\n\n", "\ufeff", "🙂", "👩‍👩‍👧", "日本語", "é", "e\u0301", "\x00", "\t", " " * 40]
PIECES += ["<|endoftext|>", "the whale ", "0" * 30, "\x7f", "\u2028", "\u202e", "\ufffd", "\U0010ffff", "\x1b[31m"]
FIXED = [b"a", b"\n", b"\r", b" ", "\ufeff".encode(), "\ufeffa\r\nb\r\n".encode(), "🙂".encode(), b"\x00", b" " * 200]
SPOILED = {  # and the place of the first byte that is no text
    b"\xff": 0, b"MZ\x90": 2, "text".encode("utf-16"): 0, b"\xc0\xaf": 0, b"a\xed\xa0\x80": 1, b"\x80": 0,
    "🙂".encode()[:3]: 0, "né".encode("latin-1"): 1, b"\xf4\x90\x80\x80": 0, b"\xf8\x88\x80\x80\x80": 0,
}  # fmt: skip


@torch.no_grad()
def by_hand(model, tokenizer, content):
    """Token by token from one forward pass, in Python's own sums."""
    row = [tokenizer.end_id, *tokenizer.encode_batch([content.decode()])[0]]
    logits = model(torch.tensor([row]))[0]
    nats = []
    for here, token in zip(logits.tolist(), row[1:], strict=False):
        largest = max(here)
        nats.append(math.log(math.fsum(math.exp(x - largest) for x in here)) + largest - here[token])
    return math.fsum(nats), len(nats)


def odd_texts(count):
    draw = random.Random(0)
    drawn = ["".join(draw.choices(PIECES, k=draw.randint(1, 6))).encode() for _ in range(count - len(FIXED))]
    return FIXED + drawn


@pytest.mark.parametrize(("pattern", "count"), [("L", 20), ("LN", 20), pytest.param("L", 150, marks=pytest.mark.long)])
def test_figures_of_odd_files_agree_with_a_count_by_hand(tokenizer, tmp_path, monkeypatch, pattern, count):
    """The state is carried from piece to piece, so that no context is lost."""
    monkeypatch.setattr(caches, "PIECE", 16)
    _, model = build(tokenizer, "--model.layer_pattern", pattern, "--model.layers.L.mixer", "gla")
    lengths = []
    for number, content in enumerate(odd_texts(count)):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content)
        found = score_text(model, read_text(path, tokenizer), tokenizer)
        nats, num_tokens = by_hand(model, tokenizer, content)
        assert found["num_bytes"] == len(content)
        assert found["num_tokens"] == num_tokens
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(content), rel=1e-9)
        assert found["perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-9)
        lengths.append(num_tokens)
    assert min(lengths) == 1
    assert max(lengths) > 32


def test_windows_begin_with_the_last_token_of_the_one_before(model, tokenizer, tmp_path):
    path = tmp_path / "text"
    path.write_bytes("It is a truth universally acknowledged, 🙂\r\n".encode() * 9)
    text = read_text(path, tokenizer)
    row, nats = [tokenizer.end_id, *text.tokens], 0.0
    for start in range(0, len(text.tokens), 10):
        window = torch.tensor([row[start : start + 11]])
        with torch.no_grad():
            log_probability = model(window[:, :-1])[0].log_softmax(-1)
        nats -= float(log_probability.gather(1, window[0, 1:, None]).sum())
    found = score_text(model, text, tokenizer, max_length=10)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(path.read_bytes()), rel=1e-9)
    whole = score_text(model, text, tokenizer)
    assert whole["bits_per_byte"] != pytest.approx(found["bits_per_byte"], rel=1e-3)
    assert score_text(model, text, tokenizer, max_length=10**6) == pytest.approx(whole, rel=1e-9)


def test_only_models_whose_memory_grows_are_given_windows(model, tokenizer, tmp_path):
    path = tmp_path / "text"
    path.write_text("a whale is a whale " * 20)
    _, pure = build(tokenizer, "--model.layer_pattern", "L")
    for one, length in ((model, 16), (pure, None)):
        found, refused = evaluate_texts(one, tokenizer, [path], max_length=None, trained_length=16)
        assert found == {str(path): score_text(one, read_text(path, tokenizer), tokenizer, length)}
        assert not refused


def test_200_odd_files_have_a_figure_or_a_sentence(model, tokenizer, tmp_path):
    """Texts have a finite figure over the bytes on disk; what is empty or spoiled has one sentence; order stays."""
    wanted = {}
    draw = random.Random(1)
    for content in odd_texts(140):
        wanted[content] = None
    wanted[b""] = "is empty: there is no byte to count."
    while len(wanted) < 200:
        start = "".join(draw.choices(PIECES, k=draw.randint(0, 3))).encode()
        spoiled, place = draw.choice(list(SPOILED.items()))
        place += len(start)
        content = start + spoiled
        wanted[content] = f"is not UTF-8 text: byte {place} is {content[place]:#04x}."
    contents = draw.sample(list(wanted), 200)
    paths = [tmp_path / f"{number}\n🙂.txt" for number in range(200)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    found, refused = evaluate_texts(model, tokenizer, paths, max_length=None, trained_length=64)
    assert list(found) == list(map(str, paths))
    for path, content in zip(paths, contents, strict=True):
        if wanted[content] is None:
            figures = found[str(path)]
            assert figures["num_bytes"] == len(content)
            assert 0 < figures["bits_per_byte"] < 1000
        else:
            assert found[str(path)] == {"error": f"{path} {wanted[content]}"}
    assert len(refused) == 200 - sum(sentence is None for sentence in wanted.values())


@pytest.mark.parametrize("num_bytes", [10**4, pytest.param(10**7, marks=pytest.mark.long)])
def test_one_line_of_many_bytes(tokenizer, tmp_path, monkeypatch, num_bytes):
    """Of a model whose logits are all zero, which costs each token the same, so that the sum is known."""
    monkeypatch.setattr(caches, "PIECE", 4096)
    path = tmp_path / "line"
    path.write_bytes(("the whale, 🙂 ".encode() * (num_bytes // 10))[:num_bytes].decode(errors="ignore").encode())
    _, model = build(tokenizer, *"--model.layer_pattern L --model.num_layers 1 --model.layers.L.mlp none".split())
    text = read_text(path, tokenizer)
    assert text.num_bytes == path.stat().st_size >= num_bytes - 3
    for parameter in model.parameters():
        parameter.data.zero_()
    found = score_text(model, text, tokenizer)
    assert found["num_tokens"] == len(text.tokens) == len(tokenizer.encode_batch([path.read_text()])[0])
    bits = found["num_tokens"] * math.log2(tokenizer.vocab_size)
    assert found["bits_per_byte"] == pytest.approx(bits / text.num_bytes, rel=1e-9)


def test_files_without_a_figure_have_a_sentence(model, tokenizer, tmp_path):
    contents = {"empty": b"", "latin": "né".encode("latin-1"), "good": b"good", "half": "🙂".encode()[:3]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in (*contents, "nowhere", ".")]
    found, refused = evaluate_texts(model, tokenizer, paths, max_length=None, trained_length=16)
    assert found[str(tmp_path / "good")]["num_bytes"] == 4
    for name, sentence in {
        "empty": "is empty: there is no byte to count.",
        "latin": "is not UTF-8 text: byte 1 is 0xe9.",
        "half": "is not UTF-8 text: byte 0 is 0xf0.",
        "nowhere": "is missing.",
        ".": "is not a regular file.",
    }.items():
        error = found[str(tmp_path / name)]["error"]
        assert error == f"{tmp_path / name} {sentence}"
        assert error in refused
    assert len(refused) == 5


def test_a_tokenizer_that_loses_text_is_named(model, tokenizer, tmp_path, monkeypatch, caplog):
    path = tmp_path / "text"
    path.write_text("ab")
    with caplog.at_level(logging.WARNING):
        read_text(path, tokenizer)
        assert not caplog.text
        monkeypatch.setattr(tokenizer, "decode", lambda ids: "a")
        assert read_text(path, tokenizer).num_bytes == 2
        assert f"does not keep all of {path}" in caplog.text
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [[]])
    with pytest.raises(ValueError, match="gives no tokens"):
        read_text(path, tokenizer)
