"""Converts a microbatch's rows to the input of the blocks: this rank's tokens and their layout."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.layers.sequence import SequenceLayout


@dataclass(frozen=True)
class Span:
    """A rank's part of every microbatch under context parallelism: the index-th of `number` equal parts.

    pieces: number of equal pieces of a span between blocks, under tensor parallelism.
    """

    index: int = 0
    number: int = 1
    pieces: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether a rank has all tokens everywhere, so that rows need not be concatenated."""
        return self.number * self.pieces == 1


@dataclass(frozen=True)
class Microbatch:
    """tokens, labels: int64, of this rank's span; labels may be None. sequence: their layout."""

    tokens: Tensor
    labels: Tensor | None
    sequence: SequenceLayout


def describe(
    tokens: Tensor,
    document_bounds: Tensor | None,
    labels: Tensor | None,
    loss_weight: float | None,
    span: Span,
    *,
    tells_padding: bool,
) -> Microbatch:
    """Return the rank's part of tokens [B, T]; arguments and errors are those of `Decoder.forward`.

    Rows are concatenated, unless there are no bounds and one rank has all tokens.
    tells_padding: whether labels mark which tokens are padding.
    """
    batch_size, length = tokens.shape
    if loss_weight is None:
        loss_weight = 0.0 if labels is None else 1.0
    if tokens.numel() % (span.number * span.pieces):
        pieces = f" of {span.pieces} pieces" * (span.pieces > 1)
        raise ValueError(
            f"{batch_size} x {length} tokens do not split into {span.number} spans{pieces}; give a multiple."
        )
    if document_bounds is None and not span.is_whole:
        document_bounds = torch.tensor([[0, length]], dtype=torch.int32, device=tokens.device).expand(batch_size, 2)
    if document_bounds is None:
        sequence = SequenceLayout.of_rows(batch_size, length, tokens.device, loss_weight)
    else:
        if document_bounds.dim() == 2 and document_bounds.shape[0] != batch_size:
            raise ValueError(
                f"document_bounds has {document_bounds.shape[0]} rows and tokens have {batch_size}; give bounds for "
                "every row."
            )
        sequence = SequenceLayout.of_packed_rows(document_bounds, length, loss_weight / span.number)
    if labels is not None and tells_padding:
        sequence = counting(sequence, labels != IGNORE_INDEX)
    if document_bounds is None:
        return Microbatch(tokens, labels, sequence)
    sequence = sequence.span(span.index, span.number)
    tokens = tokens.reshape(1, -1).chunk(span.number, 1)[span.index]
    labels = None if labels is None else labels.reshape(1, -1).chunk(span.number, 1)[span.index]
    return Microbatch(tokens, labels, sequence)


def counting(sequence: SequenceLayout, labelled: Tensor) -> SequenceLayout:
    """Mark padding: the tokens after a document's last label, on which no part of the loss depends.

    labelled: bool, as many as there are positions, whether a token has a label. A prompt without labels before an
    answer with labels counts; a document without labels does not.
    """
    position = sequence.positions.flatten()
    token = torch.arange(len(position), device=position.device)
    # The next token with a label, or, after the last one, a place beyond all tokens.
    following = torch.where(labelled.flatten(), token, len(position)).flip(0).cummin(0).values.flip(0)
    distance = following - token
    # Within a document, positions rise with tokens.
    same_document = position[following.clamp(max=len(position) - 1)] == position + distance
    counted = (same_document & (following < len(position))).view_as(sequence.positions)
    return replace(sequence, share=replace(sequence.share, counted=counted))
