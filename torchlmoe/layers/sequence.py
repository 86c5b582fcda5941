"""The layout of tokens that every layer receives: their positions, and where documents begin and end."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchlmoe.ops.checks import check_bounds_at_hand


@dataclass(frozen=True)
class MicrobatchShare:
    """Properties of a microbatch that the balance of experts needs; other layers do not read it.

    loss_weight: the microbatch's share of the rows of the optimizer step over all ranks; 0 disables balance losses and
        load counts.
    row_length: tokens in one row of data (with B = 1 the rows of a batch are concatenated).
    counted: bool [B, T], False for padding, which no load, balance loss or capacity counts; None without padding.
    """

    loss_weight: float = 1.0
    row_length: int | None = None
    counted: Tensor | None = None


@dataclass(frozen=True)
class SequenceLayout:
    """Describes x [B, T, dim] to every layer of the model.

    positions: int64 [B, T], each token's place in its document.
    cu_seqlens: int32 [N + 1] bounds of the documents packed into one row (B = 1), empty ones allowed; None if each
        row is one document.
    start: the place of the first token in the whole packed row, if ranks hold spans of it.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    start: int = 0
    share: MicrobatchShare = field(default_factory=MicrobatchShare)

    @classmethod
    def of_rows(
        cls, batch_size: int, length: int, device: torch.device | None = None, loss_weight: float = 1.0
    ) -> "SequenceLayout":
        """The layout of rows that are one document each."""
        positions = torch.arange(length, device=device).expand(batch_size, length)
        return cls(positions, share=MicrobatchShare(loss_weight, length))

    @classmethod
    def of_packed_rows(cls, document_bounds: Tensor, length: int, loss_weight: float = 1.0) -> "SequenceLayout":
        """A microbatch's B rows, concatenated; document_bounds int32 [B, max_docs + 1], filled up with `length`.

        Raises ValueError for bounds that do not rise from 0 to `length` in every row (on a GPU the device asserts it).
        """
        if document_bounds.dim() != 2 or not document_bounds.shape[1]:
            raise ValueError(f"document_bounds has shape {list(document_bounds.shape)}; it must be [B, max_docs + 1].")
        check_bounds_at_hand(document_bounds, length, "document_bounds")
        batch_size = document_bounds.shape[0]
        row_start = torch.arange(batch_size, device=document_bounds.device, dtype=torch.int32) * length
        ends = (document_bounds[:, 1:].to(torch.int32) + row_start[:, None]).reshape(-1)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends])
        tokens = torch.arange(batch_size * length, device=document_bounds.device)
        document = torch.searchsorted(ends, tokens.to(torch.int32), right=True)
        positions = (tokens - cu_seqlens[document])[None]
        return cls(positions, cu_seqlens, share=MicrobatchShare(loss_weight, length))

    def counted_T(self) -> Tensor:
        """bool [B * T], of concatenated rows: `share.counted`, or True everywhere."""
        counted = self.share.counted
        return (torch.ones_like(self.positions, dtype=torch.bool) if counted is None else counted).flatten()

    def restarted(self, cached: Tensor) -> Tensor:
        """The values of a cache [B, ...], set to zero in rows that begin a document now."""
        begins = self.positions[:, 0] == 0
        return cached.masked_fill(begins.view(-1, *[1] * (cached.dim() - 1)), 0)

    def project(self, projection: Callable[..., Tensor], x: Tensor) -> Tensor:
        """projection(x), as input of a recurrence. A layout that reorders tokens for the recurrence does it here."""
        return projection(x)

    def span(self, index: int, num_spans: int) -> "SequenceLayout":
        """The index-th of `num_spans` equal parts of one packed row."""
        positions, counted = self.positions.chunk(num_spans, 1)[index], self.share.counted
        counted = None if counted is None else counted.chunk(num_spans, 1)[index]
        share = replace(self.share, counted=counted)
        return replace(self, positions=positions, start=self.start + index * positions.shape[1], share=share)


Sequence = SequenceLayout  # its name in earlier versions
