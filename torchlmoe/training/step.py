"""Defines the interface by which the trainer computes losses and gradients of a model."""

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
    """Computes losses and gradients. Batches have tokens, labels int64 [B, T], document_bounds int32 [B, max_docs + 1].

    batches_at_once: number of batches that an evaluation processes together. counted_elsewhere: names of this rank's
    parameters that another rank has too and counts in the gradient norm.
    """

    batches_at_once: int
    counted_elsewhere: Set[str]

    def forward_backward(self, batches: Sequence[Any], num_tokens: Tensor) -> Tensor:
        """Return this rank's part of the loss of a step, float64: the sum over its batches divided by num_tokens.

        Gradients are complete afterwards: summed over batches and ranks.
        """
        ...

    def evaluate(self, batches: Sequence[Any]) -> Tensor:
        """Return this rank's part of the summed negative log-likelihood of up to `batches_at_once` batches, float64."""
        ...


class PlainStep:
    """Runs one microbatch after another.

    share: a microbatch's number of rows, as a fraction of the rows of a step over all ranks.
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
    """Returns the step for a rank's model."""
    rows, whole = batch_sizes(config.training, ranks.num_row_places)
    if model.pipeline is None:
        return PlainStep(model, rows / whole)
    return PipelineStep(model, config, ranks, device)
