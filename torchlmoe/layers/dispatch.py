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

    choice_M: int64, the index into the flattened [T, K] choices that each slot serves. token_M: int64, its token.
    slot_TK: int64, the inverse of choice_M. count_E: int64, the choices of each expert. offset_E: int32, the slot at
    which each expert's run ends.
    padding_M: True at slots that serve no choice, and only fill up runs; None where there are none. They carry some
    token's values, and a weight of zero.
    """

    choice_M: Tensor
    token_M: Tensor
    slot_TK: Tensor
    count_E: Tensor
    offset_E: Tensor
    padding_M: Tensor | None

    @classmethod
    def sorted_by_expert(cls, expert_TK: Tensor, num_experts: int, alignment: int = 1) -> "Slots":
        """expert_TK int64; an expert's slots keep the order of the tokens, and runs are multiples of `alignment`."""
        expert_M, choice_M = expert_TK.flatten().sort(stable=True)
        experts = torch.arange(num_experts, device=expert_M.device)
        end_E = torch.searchsorted(expert_M, experts, right=True)
        count_E = end_E.diff(prepend=end_E.new_zeros(1))
        slot_M = torch.arange(choice_M.shape[0], device=choice_M.device)
        padding_M = None
        if alignment > 1:
            run_E = -(-count_E // alignment) * alignment
            shift_E = (run_E.cumsum(0) - run_E) - (end_E - count_E)
            slot_M, end_E = slot_M + shift_E[expert_M], run_E.cumsum(0)
        slot_TK = torch.empty_like(choice_M).scatter_(0, choice_M, slot_M).view_as(expert_TK)
        if alignment > 1:
            padding_M = torch.ones(int(end_E[-1]), dtype=torch.bool, device=slot_M.device).index_fill_(0, slot_M, False)
            choice_M = choice_M.new_zeros(padding_M.shape).index_copy_(0, slot_M, choice_M)
        return cls(choice_M, choice_M // expert_TK.shape[1], slot_TK, count_E, end_E.int(), padding_M)

    def place_TK(self, expert_TK: Tensor) -> Tensor:
        """int64, each choice's place in its expert's run, from 0."""
        start_E = self.offset_E.roll(1)
        start_E[0] = 0
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
    """x [T, K] -> [M]: one number per choice, in the order of the slots; zero at padding."""
    x_M = _Reorder.apply(x_TK.flatten(), slots.choice_M, slots.slot_TK.flatten())
    return x_M if slots.padding_M is None else x_M.masked_fill(slots.padding_M, 0)
