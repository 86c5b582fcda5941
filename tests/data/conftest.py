"""Stores of random documents, written by the writer under test and kept beside their plain lists."""

import numpy as np
import pytest

from torchlmoe.data.store import StoreWriter
from torchlmoe.data.tokenizer import load_tokenizer

END_ID = 7


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture
def make_store(tmp_path):
    """make_store(lengths) -> (store, documents), the documents being lists of ids without their end token."""

    def make(lengths, *, vocab_size=100, shard_size=50, seed=0, token_bytes=None):
        generator = np.random.default_rng(seed)
        documents = [generator.integers(8, vocab_size, length).tolist() for length in lengths]
        folder = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        writer = StoreWriter(folder, vocab_size=vocab_size, end_id=END_ID, recipe={}, shard_size=shard_size)
        with writer:
            for ids in documents:
                writer.append(ids, 0 if token_bytes is None else int(token_bytes[ids].sum()))
            return writer.finish(token_bytes), documents

    return make
