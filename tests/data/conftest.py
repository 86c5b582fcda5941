"""Stores of random documents, written with plain numpy and kept beside their plain lists."""

import json

import numpy as np
import pytest

from torchlmoe.data.store import TokenStore
from torchlmoe.data.tokenizer import load_tokenizer

END_ID = 7


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture
def make_store(tmp_path):
    """make_store(lengths) -> (store, documents), the documents being lists of ids without their end token.

    The store is one of version 0.1, whose shards have one size and do not end where documents do.
    """

    def make(lengths, *, vocab_size=100, shard_size=50, seed=0, token_bytes=None):
        generator = np.random.default_rng(seed)
        documents = [generator.integers(8, vocab_size, length).tolist() for length in lengths]
        folder = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        stream = np.array([token for ids in documents for token in [END_ID, *ids]], dtype="<u2")
        for number, start in enumerate(range(0, len(stream), shard_size)):
            stream[start : start + shard_size].tofile(folder / f"tokens_{number:05d}.bin")
        np.cumsum([0, *(len(ids) + 1 for ids in documents)]).astype("<i8").tofile(folder / "documents.bin")
        if token_bytes is not None:
            token_bytes.astype("<u2").tofile(folder / "token_bytes.bin")
        index = {
            "recipe": {},
            "vocab_size": vocab_size,
            "end_id": END_ID,
            "token_dtype": "<u2",
            "shard_size": shard_size,
            "num_tokens": len(stream),
            "num_documents": len(documents),
            "text_bytes": 0 if token_bytes is None else int(token_bytes[stream].sum()),
            "has_token_bytes": token_bytes is not None,
            "content": "",
        }
        (folder / "index.json").write_text(json.dumps(index))
        return TokenStore(folder), documents

    return make
