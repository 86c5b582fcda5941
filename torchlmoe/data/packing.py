"""Cuts a token stream into rows of `seq_len` tokens, with the bounds of documents in each row.

Row r has tokens [r L, (r + 1) L) of the store, and the label of a token is the next token of the stream. A document is
stored as [end, t1 .. tn], so the label of its last token is the end token of the next document (after the last
document, one that is not stored). So the model learns to stop, and every token of the text is a label exactly once,
also at row boundaries. If a row boundary cuts a document, the rest is a separate document in the next row.

Only the last row can be short. It is filled with end tokens, a separate document with IGNORE_INDEX as labels.
"""

import numpy as np
import torch
from torch import Tensor

from torchlmoe.data.store import TokenStore
from torchlmoe.layers.cross_entropy import IGNORE_INDEX

STARTS_AT_ONCE = 2**22  # documents, since a copy of all starts may not fit in memory


def num_rows(store: TokenStore, seq_len: int) -> int:
    """Returns the number of rows of `seq_len` tokens. The last one may have padding."""
    return -(-store.num_tokens // seq_len)


def max_documents(store: TokenStore, seq_len: int) -> int:
    """Returns the largest number of documents in any row, which gives all `document_bounds` one shape."""
    starts = store.document_starts[:-1]
    most = last_row = in_last_row = 0
    for first in range(0, len(starts), STARTS_AT_ONCE):
        piece = starts[first : first + STARTS_AT_ONCE]
        # Starts rise, so those of a row are consecutive. A start at the beginning of a row adds no document.
        rows, counts = np.unique(piece[piece % seq_len != 0] // seq_len, return_counts=True)
        if not len(rows):
            continue
        if rows[0] == last_row:
            counts[0] += in_last_row
        most, last_row, in_last_row = max(most, int(counts.max())), int(rows[-1]), int(counts[-1])
    has_filling = store.num_tokens % seq_len != 0
    in_end = in_last_row if last_row == num_rows(store, seq_len) - 1 else 0
    return 1 + max(most, in_end + has_filling)


def row(store: TokenStore, index: int, seq_len: int, max_docs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns row `index` of the store, or a row of padding after the last one.

    Returns tokens int64 [seq_len], labels int64 [seq_len] (IGNORE_INDEX for no label) and document_bounds int32
    [max_docs + 1]: 0, the starts of the other documents, and then `seq_len` until the end.
    """
    begin = index * seq_len
    stream = store.tokens(begin, begin + seq_len + 1)
    length = min(seq_len, max(store.num_tokens - begin, 0))
    tokens_L = np.full(seq_len, store.end_id, dtype=np.int64)
    tokens_L[:length] = stream[:length]
    labels_L = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
    labels_L[:length] = store.end_id
    labels_L[: max(len(stream) - 1, 0)] = stream[1:]
    if (own := store.own_labels(begin, begin + length)) is not None:
        labels_L[:length] = own

    starts = store.document_starts
    # The end of the last document counts as a start, that of the padding.
    first, last = np.searchsorted(starts, [begin + 1, begin + seq_len])
    inside = starts[first:last] - begin
    assert len(inside) < max_docs, "max_docs must come from max_documents(store, seq_len)"
    bounds_N = np.full(max_docs + 1, seq_len, dtype=np.int32)
    bounds_N[0] = 0
    bounds_N[1 : len(inside) + 1] = inside
    return torch.from_numpy(tokens_L), torch.from_numpy(labels_L), torch.from_numpy(bounds_N)
