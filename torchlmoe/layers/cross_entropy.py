"""Output projection and cross entropy together, for a chunk of tokens at a time: logits never exist as a whole.

With gradients enabled, each chunk's gradients are computed while its logits exist; the backward only
scales them. So the projection runs once, and no logits are kept or recomputed.
"""

from typing import Protocol

import torch
from torch import Tensor

from torchlmoe.layers.linear import linear

IGNORE_INDEX = -100


class Vocabulary(Protocol):
    """A rank's part of a vocabulary that is split over ranks; see `styles.vocabulary.VocabularyPart`."""

    def own(self, token: Tensor, num_rows: int) -> tuple[Tensor, Tensor]: ...

    def total(self, x: Tensor, operation: str = "sum") -> Tensor: ...


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int = 512, vocabulary: Vocabulary | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(weight h)_label, in at least float32.

    hidden [T, D]; weight [V, D]; labels int64 [T], -100 for tokens that do not count. chunk_size: tokens whose logits
    are in memory at once. Gradients of gradients are not supported.
    vocabulary: given if weight holds this rank's rows only. Then every rank returns the same sum, from three numbers
    per token, and the gradient of hidden is the part of its rows.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_size, vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, vocabulary: Vocabulary | None
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_grad else None
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            hidden_CD, labels_C = hidden[rows], labels[rows]
            counted_C = labels_C != IGNORE_INDEX
            index_C1 = labels_C.where(counted_C, 0)[:, None]
            own_C1: Tensor | None = None  # whether the label is among this rank's rows
            if vocabulary is not None:
                index_C1, own_C1 = vocabulary.own(index_C1, weight.shape[0])
            logits_CV = linear(hidden_CD, weight).to(dtype)
            logits_CV -= _largest(logits_CV, vocabulary)
            chosen_C1 = logits_CV.gather(-1, index_C1)
            sum_C1 = logits_CV.exp_().sum(-1, keepdim=True)
            if vocabulary is not None:
                assert own_C1 is not None
                chosen_C1, sum_C1 = vocabulary.total(torch.stack([chosen_C1 * own_C1, sum_C1])).unbind()
            loss += ((sum_C1.log() - chosen_C1)[:, 0] * counted_C).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # The gradient is softmax, minus one at the label; zero for tokens that do not count.
            logits_CV *= counted_C[:, None] / sum_C1
            here_C1 = counted_C[:, None] if own_C1 is None else counted_C[:, None] & own_C1
            logits_CV.scatter_add_(-1, index_C1, -here_C1.to(dtype))
            grad_CV = logits_CV.to(hidden.dtype)
            grad_hidden[rows] = linear(grad_CV, weight.mT)
            if grad_weight.dtype == grad_CV.dtype:
                grad_weight.addmm_(grad_CV.mT, hidden_CD)
            else:
                grad_weight += linear(grad_CV.mT, hidden_CD.mT)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        return scaled_hidden, (grad_weight * grad).to(ctx.weight_dtype), None, None, None


def _largest(logits_CV: Tensor, vocabulary: Vocabulary | None) -> Tensor:
    """[C, 1], over the whole vocabulary."""
    largest_C1 = logits_CV.amax(-1, keepdim=True)
    return largest_C1 if vocabulary is None else vocabulary.total(largest_C1, "max")
