"""Rows against a token-by-token packing written with plain lists."""

import numpy as np
import pytest

from torchlmoe.data.packing import max_documents, num_rows, row
from torchlmoe.layers.cross_entropy import IGNORE_INDEX

END = 7
LENGTHS = {
    "ordinary": [5, 0, 17, 1, 40, 3],
    "aligned": [7, 7, 15, 0, 6],  # documents that end where rows of 8 do
    "tiny": [0] * 50,
    "one": [100],
    "exact": [15],
}


def pack(documents, seq_len):
    """(tokens, labels, list of document starts) of every row, one token at a time."""
    everything = []
    for number, ids in enumerate(documents):
        tokens = [END, *ids]
        everything += zip(tokens, [*tokens[1:], END], [number] * len(tokens), strict=True)
    everything += [(END, IGNORE_INDEX, "filling")] * (-len(everything) % seq_len)
    for begin in range(0, len(everything), seq_len):
        tokens, labels, owners = zip(*everything[begin : begin + seq_len], strict=True)
        starts = [i for i in range(seq_len) if i == 0 or owners[i] != owners[i - 1]]
        yield list(tokens), list(labels), starts


@pytest.mark.parametrize("seq_len", [1, 2, 8, 16, 33])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("starts_at_once", [1, 3, 2**22])
def test_rows_equal_packing_by_hand(make_store, monkeypatch, lengths, seq_len, starts_at_once):
    monkeypatch.setattr("torchlmoe.data.packing.STARTS_AT_ONCE", starts_at_once)
    store, documents = make_store(lengths, shard_size=13)
    expected = list(pack(documents, seq_len))
    max_docs = max_documents(store, seq_len)
    assert num_rows(store, seq_len) == len(expected)
    assert max_docs == max(len(starts) for _, _, starts in expected)
    for index, (tokens, labels, starts) in enumerate(expected):
        tokens_L, labels_L, bounds = row(store, index, seq_len, max_docs)
        assert tokens_L.tolist() == tokens
        assert labels_L.tolist() == labels
        assert bounds.tolist() == starts + [seq_len] * (max_docs + 1 - len(starts))


@pytest.mark.parametrize("seq_len", [1, 3, 8, 64, 1000])
def test_every_token_is_a_label_once_and_every_document_ends(make_store, seq_len):
    store, documents = make_store(np.random.default_rng(1).integers(0, 30, 40).tolist())
    max_docs = max_documents(store, seq_len)
    labels = [x for i in range(num_rows(store, seq_len)) for x in row(store, i, seq_len, max_docs)[1].tolist()]
    assert [x for x in labels if x != IGNORE_INDEX] == [x for ids in documents for x in [*ids, END]]


def test_beyond_the_last_row_all_is_filling(make_store):
    store, _ = make_store([20, 3])
    for index in (4, 5, 100):
        tokens, labels, bounds = row(store, index, 8, 3)
        assert tokens.tolist() == [END] * 8
        assert labels.tolist() == [IGNORE_INDEX] * 8
        assert bounds.tolist() == [0, 8, 8, 8]
