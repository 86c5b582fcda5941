"""From a dataset to a token store: what is stored, when it is built anew, and who builds it."""

import itertools
import json
import logging
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from tests.conftest import PRELOADED
from torchlmoe.data import prepare as prepare_module
from torchlmoe.data import tokenizing
from torchlmoe.data.loader import validation_batches, validation_text_bytes
from torchlmoe.data.prepare import prepare
from torchlmoe.data.tokenizer import load_tokenizer

ASSETS = Path(__file__).parents[2] / "assets"
TEXTS = ["First document.", "", "Zweites: äöü 日本語 👩‍👧.", "x" * 300, "The end of it all.\n"] * 40


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def build(dataset, tokenizer, tmp_path):
    def build(split="train", **options):
        defaults = {"dataset": dataset, "tokenizer": tokenizer, "cache_dir": tmp_path / "cache"}
        return prepare(split=split, **{**defaults, "validation_fraction": 0, **options})

    return build


def documents_of(store):
    starts = store.document_starts
    return [store.tokens(a, b).tolist() for a, b in itertools.pairwise(starts)]


def expected_documents():
    raw = RawTokenizer.from_file(str(ASSETS / "tokenizer.json"))
    return [[0, *raw.encode(text).ids] for text in TEXTS if text]


def test_long_names_and_content(build, tmp_path):
    """The store's identity is that of its tokens in their order, whatever the file is called."""
    stores = {}
    for name, texts in {
        "a" * 240: ["one", "two"],
        "b": ["one", "two"],
        "c": ["two", "one"],
        "d": ["on", "etwo"],
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        stores[name[0]] = build(dataset=str(path)).index.content
    assert stores["a"] == stores["b"]
    assert len(set(stores.values())) == 3


def bpe(path, texts, **options):
    """Trained on texts, without a token for anything else, and with an end token that is not marked as special."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, show_progress=False, **options))
    raw.add_tokens(["</s>"])
    raw.save(str(path))
    return load_tokenizer(path)


def test_text_that_the_tokenizer_drops_is_said(build, tmp_path, caplog):
    tokenizer = bpe(tmp_path / "tokenizer.json", [text for text in TEXTS if text.isascii()])
    build(tokenizer=tokenizer)
    assert "no token for some characters of" in caplog.text
    assert "'ä'" in caplog.text
    caplog.clear()
    build(tokenizer=bpe(tmp_path / "tokenizer.json", TEXTS))
    assert "no token" not in caplog.text


@pytest.mark.parametrize("characters_at_once", [1, 500, 2**22])
def test_documents_are_stored_whole(build, monkeypatch, characters_at_once):
    monkeypatch.setattr(tokenizing, "CHARACTERS_AT_ONCE", characters_at_once)
    store = build()
    assert documents_of(store) == expected_documents()
    assert store.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert store.token_bytes is not None


def test_embedded_validation_counts_every_byte(tokenizer, tmp_path):
    store = prepare("embedded", "validation", tokenizer=tokenizer, cache_dir=tmp_path)
    texts = pq.read_table(ASSETS / "embedded" / "validation.parquet")["text"].to_pylist()
    assert store.text_bytes == 751_568 == sum(len(text.encode()) for text in texts)
    assert store.num_documents == len(texts) == 21
    assert [tokenizer.decode(ids[1:]) for ids in documents_of(store)] == texts
    counted = 0
    for batch in validation_batches(store, seq_len=1024, batch_size=4):
        counted += int(store.token_bytes[batch["labels"][batch["labels"] >= 0].numpy()].sum())
    assert counted == 751_568


@pytest.mark.parametrize("max_tokens", [2, 3, 100, 777, 10**6])
def test_max_tokens_cuts_exactly(build, max_tokens):
    stream = list(itertools.chain(*expected_documents()))
    store = build(max_tokens=max_tokens)
    assert list(itertools.chain(*documents_of(store))) == stream[:max_tokens]
    table = load_tokenizer("embedded").token_bytes()
    assert store.text_bytes == sum(int(table[token]) for token in stream[:max_tokens])
    with pytest.raises(ValueError, match=r"max_tokens = 1 leaves no text to read: give at least 2"):
        build(max_tokens=1)


def test_built_once_and_anew_only_when_something_changed(build, dataset, monkeypatch):
    builds = []
    really_build = prepare_module._Build._build
    monkeypatch.setattr(prepare_module._Build, "_build", lambda b: builds.append(b.folder) or really_build(b))
    for options in ({}, {"max_tokens": 50}, {"validation_fraction": 0.5}, {"text_column": "text"}):
        assert documents_of(build(**options)) == documents_of(build(**options))
    assert len(builds) == len(set(builds)) == 3
    with open(dataset, "a") as file:
        file.write('{"text": "one more"}\n')
    assert build().num_documents == len([text for text in TEXTS if text]) + 1
    assert len(builds) == 4


def test_tokens_of_a_hub_dataset_are_found_without_a_connection(build, monkeypatch):
    monkeypatch.setattr(HfApi, "dataset_info", lambda *a, **k: SimpleNamespace(sha="1234"))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, revision: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"text": text} for text in TEXTS]))
    assert documents_of(build(dataset="owner/name")) == expected_documents()
    monkeypatch.delattr(datasets, "get_dataset_split_names")
    monkeypatch.delattr(datasets, "load_dataset")
    assert documents_of(build(dataset="owner/name")) == expected_documents()


def test_a_normalizer_that_rewrites_text_leaves_no_byte_lengths(build, tmp_path):
    raw = RawTokenizer.from_file(str(ASSETS / "tokenizer.json"))
    raw.normalizer = normalizers.NFD()
    raw.save(str(tmp_path / "nfd.json"))
    tokenizer = load_tokenizer(tmp_path / "nfd.json")
    store = build(tokenizer=tokenizer)
    assert store.token_bytes is None
    assert store.text_bytes == sum(len(text.encode()) for text in TEXTS)
    with pytest.raises(ValueError, match="are unknown"):
        validation_text_bytes(store, seq_len=16, batch_size=1, max_batches=1)
    # Cut after the 'a' of a decomposed 'ä': whole characters of the text as it was.
    first, third = expected_documents()[0], "Zweites: ä"
    cut = len(first) + 1 + len(tokenizer.encode_batch([third])[0])
    assert build(tokenizer=tokenizer, max_tokens=cut).text_bytes == len((TEXTS[0] + third).encode())


def test_no_text_is_an_error_that_leaves_nothing(build, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"The train split of .* has no documents with text"):
        build(dataset=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"The validation split of .*validation\.enable = false"):
        build("validation")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock", ".lock"]


def test_a_damaged_store_is_reported(build):
    store = build()
    (store.folder / "tokens_00000.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=f"delete the folder {store.folder}"):
        build()


def test_progress_is_logged(build, caplog, monkeypatch):
    monkeypatch.setattr("torchlmoe.data.progress.LOG_INTERVAL_SECONDS", 0)
    with caplog.at_level(logging.INFO, logger="torchlmoe"):
        store = build()
    assert len(caplog.messages) == 3  # after a batch, a piece and at the end
    assert f"{store.num_documents} documents, 0.0 MB of text, {store.num_tokens:,} tokens" in caplog.messages[-1]


def race(dataset, cache_dir, barrier, results):
    """One of several processes that want the same store at the same time."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    builds = []
    really_build = prepare_module._Build._tokenize

    def slow_build(build):
        builds.append(1)
        time.sleep(1)  # long enough for the others to come upon the lock
        really_build(build)

    prepare_module._Build._tokenize = slow_build
    tokenizer = load_tokenizer("embedded")
    barrier.wait(timeout=60)
    store = prepare(dataset, "train", tokenizer=tokenizer, cache_dir=cache_dir, validation_fraction=0)
    waits = sum("waiting for it" in message for message in messages)
    results.put((len(builds), waits, np.asarray(store.tokens(0, store.num_tokens)).tolist()))


def test_of_several_processes_one_builds(dataset, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=race, args=(dataset, tmp_path / "c", barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    builds, waits, tokens = zip(*[results.get(timeout=120) for _ in processes], strict=True)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sum(builds) == 1
    assert all(wait == 1 - build for build, wait in zip(builds, waits, strict=True))
    expected = list(itertools.chain(*expected_documents()))
    assert all(stream == expected for stream in tokens)
