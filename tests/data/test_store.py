"""The store's files compared with plain numpy, atomic writing, and messages about damaged files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import files_at_most
from torchlmoe.data import store_writer
from torchlmoe.data.store import Shard, TokenStore
from torchlmoe.data.store_writer import ShardWriter, failures_named, publish_store, token_dtype


def stream_of(documents, end_id=7):
    return [token for ids in documents for token in [end_id, *ids]]


@pytest.mark.parametrize("shard_size", [1, 7, 50, 1000])
def test_round_trip_across_shards(make_store, shard_size):
    store, documents = make_store([3, 0, 60, 1, 20], shard_size=shard_size)
    stream = stream_of(documents)
    files = sorted(store.folder.glob("tokens_*.bin"))
    assert len(files) == -(-len(stream) // shard_size)
    assert np.concatenate([np.fromfile(file, "<u2") for file in files]).tolist() == stream
    for start in range(0, len(stream) + 2, 3):
        for stop in (start, start + 1, start + 17, len(stream) + 9):
            assert store.tokens(start, stop).tolist() == stream[start:stop]
    starts = [0, *np.cumsum([len(ids) + 1 for ids in documents])]
    assert np.fromfile(store.folder / "documents.bin", "<i8").tolist() == starts
    assert store.document_starts.tolist() == starts
    assert (store.num_tokens, store.num_documents) == (len(stream), len(documents))


def write_store(folder, shards, *, vocab_size=100, end_id=7):
    """A store of shards, each a list of documents."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir()
    names = [f"tokens_{number:05d}.bin" for number in range(len(shards))]
    writers = [ShardWriter(partial / name, vocab_size=vocab_size, end_id=end_id) for name in names]
    for writer, documents in zip(writers, shards, strict=True):
        for ids in documents:
            writer.append(np.array(ids))
        writer.finish()
    dtype = token_dtype(vocab_size)
    return publish_store(
        partial,
        folder,
        shards=[Shard(name, writer.num_tokens, dtype) for name, writer in zip(names, writers, strict=True)],
        lengths=[np.array(writer.lengths) for writer in writers],
        recipe={},
        vocab_size=vocab_size,
        end_id=end_id,
        text_bytes=0,
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")])
def test_token_type_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    store = write_store(tmp_path / "s", [[[vocab_size - 1, 1]]], vocab_size=vocab_size, end_id=0)
    assert np.fromfile(tmp_path / "s" / "tokens_00000.bin", dtype).tolist() == [0, vocab_size - 1, 1]
    assert store.tokens(0, 3).tolist() == [0, vocab_size - 1, 1]


@pytest.mark.parametrize("at_once", [1, 5, 2**24])
@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_identity_is_that_of_each_document_in_turn(tmp_path, monkeypatch, vocab_size, at_once):
    """As version 0.1 took it, whatever the shards."""
    monkeypatch.setattr(store_writer, "TOKENS_HASHED_AT_ONCE", at_once)
    documents = [[8, 9, 10], [], [11] * 20, [12], [13, 14]]
    dtype = "<u2" if vocab_size == 100 else "<u4"
    digest = hashlib.sha256(f"{dtype} {vocab_size} 7".encode())
    for ids in documents:
        digest.update(np.array([len(ids) + 1], dtype="<i8").tobytes())
        digest.update(np.array([7, *ids], dtype=dtype).tobytes())
    for number, shards in enumerate([[documents], [documents[:2], documents[2:]], [[ids] for ids in documents]]):
        store = write_store(tmp_path / f"s{number}", shards, vocab_size=vocab_size)
        assert store.index.content == digest.hexdigest()
        assert store.tokens(0, 100).tolist() == stream_of(documents)
        assert store.document_starts.tolist() == [0, 4, 5, 26, 28, 31]


def test_many_shards_take_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr("torchlmoe.data.store.MOST_OPEN_SHARDS", 3)
    store = write_store(tmp_path / "s", [[[index + 8]] for index in range(50)])
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert store.tokens(0, 100).tolist() == stream_of([[index + 8] for index in range(50)])
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


@pytest.mark.parametrize("length", [2000, 2_000_000])  # known when the store is closed, and while it is written
def test_a_full_disk_is_named(length, tmp_path):
    def write():
        writer = ShardWriter(tmp_path / "tokens_00000.bin", vocab_size=10, end_id=0)
        with failures_named(tmp_path / "s.partial"):
            try:
                writer.append(np.ones(length, dtype=np.int64))
                writer.finish()
            finally:
                writer.drop()

    with files_at_most(1000), pytest.raises(OSError, match=r"tokens could not be written to .*s\.partial: File too la"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path):
    partial = tmp_path / "s.partial"
    partial.mkdir()
    (partial / "tokens_00005.bin.host.1.unfinished").write_bytes(b"old")
    writer = ShardWriter(partial / "tokens_00000.bin", vocab_size=10, end_id=0)
    writer.append(np.array([1, 2]))
    writer.finish()
    shards, lengths = [Shard("tokens_00000.bin", 3, "<u2")], [np.array([3])]
    publish_store(
        partial, tmp_path / "s", shards=shards, lengths=lengths, recipe={}, vocab_size=10, end_id=0, text_bytes=2
    )
    names = [path.name for path in sorted((tmp_path / "s").iterdir())]
    assert names == ["documents.bin", "index.json", "tokens_00000.bin"]


@pytest.mark.parametrize("name", ["tokens_00001.bin", "documents.bin", "token_bytes.bin", "index.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_damage_is_named_with_its_remedy(make_store, name, damage):
    store, _ = make_store([30, 40, 50], token_bytes=np.ones(100, dtype=np.uint16))
    path = store.folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "short" else content + b"x")
    with pytest.raises(ValueError, match=f"{name} .*: delete the folder {store.folder} and the tokens are built again"):
        TokenStore(store.folder)


def test_an_index_of_another_form_is_damage(make_store):
    store, _ = make_store([3])
    index = json.loads((store.folder / "index.json").read_text())
    (store.folder / "index.json").write_text(json.dumps({**index, "unheard_of": 1}))
    with pytest.raises(ValueError, match=r"index\.json cannot be read: delete the folder"):
        TokenStore(store.folder)
