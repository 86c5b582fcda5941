"""The store's files against plain numpy, its atomic writing, and what it says of damaged files."""

import json

import numpy as np
import pytest

from tests.conftest import files_at_most
from torchlmoe.data.store import StoreWriter, TokenStore


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


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")])
def test_token_type_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    with StoreWriter(tmp_path / "s", vocab_size=vocab_size, end_id=0, recipe={}) as writer:
        writer.append([vocab_size - 1, 1], 2)
        store = writer.finish()
    assert store.index.token_dtype == dtype
    assert np.fromfile(tmp_path / "s" / "tokens_00000.bin", dtype).tolist() == [0, vocab_size - 1, 1]
    assert store.tokens(0, 3).tolist() == [0, vocab_size - 1, 1]


def test_nothing_is_there_before_finish(tmp_path):
    def write_half():
        with StoreWriter(tmp_path / "s", vocab_size=10, end_id=0, recipe={}) as writer:
            writer.append([1, 2], 2)
            assert not (tmp_path / "s").exists()
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [2000, 2_000_000])  # known when the store is closed, and while it is written
def test_a_full_disk_is_named(length, tmp_path):
    def write():
        with StoreWriter(tmp_path / "s", vocab_size=10, end_id=0, recipe={}) as writer:
            writer.append([1] * length, length)
            writer.finish()

    with files_at_most(1000), pytest.raises(OSError, match=r"tokens could not be written to .*s\.partial: File too la"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writers_folder_is_replaced(tmp_path):
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "tokens_00005.bin").write_bytes(b"old")
    with StoreWriter(tmp_path / "s", vocab_size=10, end_id=0, recipe={}) as writer:
        writer.append([1, 2], 2)
        writer.finish()
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
