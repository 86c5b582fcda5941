"""Moves tokens to their experts and back, by gathers only: nothing is added in an order that could vary.

A *slot* is one (token, choice) pair in the order in which the experts work, sorted by expert. Gathering slots
from tokens and summing a token's slots are each other's derivative:

    gather_slots:  y_MD = x_TD[token_of_slot]                    backward: sum_slots
    sum_slots:     y_TD = sum_k x_MD[slot_of_choice[:, k]]       backward: gather_slots

Legend: T tokens, K experts per token, M = T * K slots, E experts, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """The order in which the experts work.

    choice_M: int64, the index into the flattened [T, K] choices that each slot serves. token_M = choice_M //
    K.
    slot_TK: int64, the inverse of choice_M. offset_E: int32, the slot at which each expert's run ends.
    """

    choice_M: Tensor
    token_M: Tensor
    slot_TK: Tensor
    offset_E: Tensor

    @classmethod
    def sorted_by_expert(cls, expert_TK: Tensor, num_experts: int) -> "Slots":
        """expert_TK int64; an expert's slots keep the order of the tokens."""
        expert_M, choice_M = expert_TK.flatten().sort(stable=True)
        places_M = torch.arange(choice_M.shape[0], device=choice_M.device)
        slot_TK = torch.empty_like(choice_M).scatter_(0, choice_M, places_M).view_as(expert_TK)
        experts = torch.arange(num_experts, device=expert_M.device)
        offset_E = torch.searchsorted(expert_M, experts, right=True, out_int32=True)
        return cls(choice_M, choice_M // expert_TK.shape[1], slot_TK, offset_E)

    def count_E(self) -> Tensor:
        """int64, the slots of each expert."""
        return self.offset_E.diff(prepend=self.offset_E.new_zeros(1)).long()

    def place_TK(self, expert_TK: Tensor) -> Tensor:
        """int64, each choice's place in its expert's run, from 0."""
        start_E = self.offset_E - self.count_E()
        return self.slot_TK - start_E[expert_TK]


class _GatherSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_M, slot_TK)
        return x_TD.index_select(0, token_M)

    @staticmethod
    def backward(ctx, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        token_M, slot_TK = ctx.saved_tensors
        return _SumSlots.apply(grad_MD, token_M, slot_TK), None, None


class _SumSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_M, slot_TK)
        # Gathers and adds without writing the gathered rows; low precisions are added up in float32.
        return F.embedding_bag(slot_TK, x_MD.contiguous(), mode="sum")

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        token_M, slot_TK = ctx.saved_tensors
        return _GatherSlots.apply(grad_TD, token_M, slot_TK), None, None


class _Reorder(torch.autograd.Function):
    """x[order]; with the inverse at hand the backward gathers too."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, order), None, None


def gather_slots(x_TD: Tensor, slots: Slots) -> Tensor:
    """x [T, D] -> [M, D]: every slot's token."""
    return _GatherSlots.apply(x_TD, slots.token_M, slots.slot_TK)


def sum_slots(x_MD: Tensor, slots: Slots) -> Tensor:
    """x [M, D] -> [T, D]: the sum over each token's slots, added in at least float32, in x's dtype."""
    return _SumSlots.apply(x_MD, slots.token_M, slots.slot_TK)


def reorder_choices(x_TK: Tensor, slots: Slots) -> Tensor:
    """x [T, K] -> [M]: one number per choice, in the order of the slots."""
    return _Reorder.apply(x_TK.flatten(), slots.choice_M, slots.slot_TK.flatten())
