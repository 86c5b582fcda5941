"""Forward and backward of a step: all that the trainer knows of how a model computes its gradients."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlmoe.model.decoder import Decoder


class Step(Protocol):
    """forward_backward(batches, num_tokens) -> this rank's part of the loss, float64; gradients are added up."""

    def __call__(self, batches: Sequence[Any], num_tokens: Tensor) -> Tensor: ...


class PlainStep:
    """One microbatch after another.

    share: of a microbatch in the step's rows over all ranks. Rows are all of one length, so that the share does not
    depend on how they are cut.
    """

    def __init__(self, model: Decoder, share: float):
        self.model, self.share = model, share

    def __call__(self, batches: Sequence[Any], num_tokens: Tensor) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64, device=num_tokens.device)
        for batch in batches:
            nll = self.model(batch["tokens"], batch["document_bounds"], batch["labels"], self.share)
            loss = nll / num_tokens
            loss.backward()
            loss_sum += loss.detach()
        return loss_sum
