"""From a microbatch's rows to what the blocks see: which tokens this rank has, and how they are laid out."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchlmoe.layers.cross_entropy import IGNORE_INDEX
from torchlmoe.layers.sequence import SequenceLayout


@dataclass(frozen=True)
class Span:
    """The index-th of `number` equal parts of every microbatch, which is what a rank has under context parallelism.

    pieces: of equal length that a span is cut into between blocks, under tensor parallelism.
    """

    index: int = 0
    number: int = 1
    pieces: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether a rank has all tokens everywhere, so that rows may stay as they are."""
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
    """The rank's part of tokens [B, T]; arguments and errors as of `Decoder.forward`.

    Without bounds and with all tokens on one rank, rows stay as they are; else they are laid back to back.
    tells_padding: whether labels tell which tokens are padding.
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
    """Tells padding apart: the tokens after a document's last label, of which no part of the loss depends.

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
