"""The interface by which the trainer computes losses and gradients of a model."""

from collections.abc import Sequence, Set
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlmoe.config.batch import batch_sizes
from torchlmoe.config.settings import Config
from torchlmoe.model.decoder import Decoder
from torchlmoe.parallel.islands import sum_island_gradients
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.training.pipeline_step import PipelineStep


class Step(Protocol):
    """Batches hold tokens, labels int64 [B, T] and document_bounds int32 [B, max_docs + 1].

    batches_at_once: how many batches an evaluation works on together. counted_elsewhere: names of this rank's
    parameters that others have too, and of which these count the gradient in its norm.
    """

    batches_at_once: int
    counted_elsewhere: Set[str]

    def forward_backward(self, batches: Sequence[Any], num_tokens: Tensor) -> Tensor:
        """This rank's part of a step's loss, float64: the sum over the batches divided by num_tokens.

        The gradients are whole: summed over batches and ranks.
        """
        ...

    def evaluate(self, batches: Sequence[Any]) -> Tensor:
        """This rank's part of the summed negative log-likelihood of at most `batches_at_once` batches, float64."""
        ...


class PlainStep:
    """One microbatch after another.

    share: of a microbatch in the step's rows over all ranks. Rows are all of one length, so that the share does not
    depend on how they are cut.
    """

    batches_at_once = 1
    counted_elsewhere: Set[str] = frozenset()

    def __init__(self, model: Decoder, share: float):
        self.model, self.share = model, share

    def forward_backward(self, batches: Sequence[Any], num_tokens: Tensor) -> Tensor:
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=num_tokens.device)
        for batch in batches:
            nll = self.model(batch["tokens"], batch["document_bounds"], batch["labels"], self.share)
            loss = nll / num_tokens
            loss.backward()
            loss_sum += loss.detach()
        sum_island_gradients(self.model)
        return loss_sum

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any]) -> Tensor:
        self.model.eval()
        (batch,) = batches
        return self.model(batch["tokens"], batch["document_bounds"], batch["labels"]).double()


def build_step(model: Decoder, config: Config, ranks: Ranks, device: torch.device) -> Step:
    """The step of a rank's model."""
    rows, whole = batch_sizes(config.training, ranks.num_row_places)
    if model.pipeline is None:
        return PlainStep(model, rows / whole)
    return PipelineStep(model, config, ranks, device)
