"""Token dispatch and combine, by gathers only, so that the order of sums is fixed.

A *slot* is a pair of a token and one of its experts; slots are sorted by expert. Gathering slots from tokens and
summing a token's slots are each other's derivative:

    gather_slots:  y_MD = x_TD[token_of_slot]                    backward: sum_slots
    sum_slots:     y_TD = sum_k x_MD[slot_of_choice[:, k]]       backward: gather_slots

On a GPU both run as kernels (kernels/moe_permute.py).

Legend: T tokens, K experts per token, M = T * K slots, E experts, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlmoe.ops.kernel_backend import kernels_serve
from torchlmoe.ops.operation import custom_op, data_dependent_size, operation


@dataclass(frozen=True)
class Slots:
    """The order of slots.

    choice_M: int64, each slot's index into the flattened [T, K] choices. token_M: int64, its token. slot_TK: int64, the
    inverse of choice_M. offset_E: int32, the slot at which each expert's run ends.
    padding_M: bool, True for slots of no choice, which only fill up runs; None if there are none. They have the values
    of some token, and a weight of zero.
    """

    choice_M: Tensor
    token_M: Tensor
    slot_TK: Tensor
    offset_E: Tensor
    padding_M: Tensor | None

    @classmethod
    def sorted_by_expert(cls, expert_TK: Tensor, num_experts: int, alignment: int = 1) -> "Slots":
        """Sort choices expert_TK, int64, by expert and then by token. Lengths of runs are multiples of `alignment`."""
        choice_M, slot_TK, offset_E, padding_M = _sort(expert_TK, num_experts, alignment)
        token_M = choice_M // expert_TK.shape[1]
        return cls(choice_M, token_M, slot_TK, offset_E, padding_M if alignment > 1 else None)

    def place_TK(self, expert_TK: Tensor, counted_T: Tensor) -> Tensor:
        """int64 [T, K]: number of choices of counted tokens (bool [T]) before each choice in its expert's run."""
        start_E = self.offset_E.roll(1)
        start_E[0] = 0
        counted_M = counted_T[self.token_M] if self.padding_M is None else counted_T[self.token_M] & ~self.padding_M
        before_M = F.pad(counted_M.cumsum(0), (1, 0))  # M + 1 numbers: empty runs at the end begin at M
        return before_M[self.slot_TK] - before_M[start_E[expert_TK]]


@custom_op("torchlmoe::sort_slots")
def _sort(expert_TK: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns choice_M, slot_TK, offset_E and padding_M (empty with alignment 1) of `Slots`."""
    # A CPU uses radix sort, which needs half as many passes for 32 bits as for 64.
    expert_M = expert_TK.flatten().int() if expert_TK.device.type == "cpu" else expert_TK.flatten()
    expert_M, choice_M = expert_M.sort(stable=True)
    experts = torch.arange(num_experts, dtype=expert_M.dtype, device=expert_M.device)
    end_E = torch.searchsorted(expert_M, experts, right=True)
    slot_M = torch.arange(choice_M.shape[0], device=choice_M.device)
    if alignment > 1:
        count_E = end_E.diff(prepend=end_E.new_zeros(1))
        run_E = -(-count_E // alignment) * alignment
        shift_E = (run_E.cumsum(0) - run_E) - (end_E - count_E)
        slot_M, end_E = slot_M + shift_E[expert_M], run_E.cumsum(0)
    slot_TK = torch.empty_like(choice_M).scatter_(0, choice_M, slot_M).view_as(expert_TK)
    padding_M = torch.ones(int(end_E[-1]) if alignment > 1 else 0, dtype=torch.bool, device=slot_M.device)
    if alignment > 1:
        padding_M.index_fill_(0, slot_M, False)
        choice_M = choice_M.new_zeros(padding_M.shape).index_copy_(0, slot_M, choice_M)
    return choice_M, slot_TK, end_E.int(), padding_M


@_sort.register_fake
def _(expert_TK, num_experts, alignment):
    num_slots = expert_TK.numel()
    if alignment > 1:  # the number of padding slots depends on the choices
        num_slots = data_dependent_size(
            lambda: -(-expert_TK.numel() // alignment) * alignment + num_experts * alignment
        )
    return (
        expert_TK.new_empty(num_slots),
        torch.empty_like(expert_TK, memory_format=torch.contiguous_format),
        expert_TK.new_empty(num_experts, dtype=torch.int32),
        expert_TK.new_empty(0 if alignment == 1 else num_slots, dtype=torch.bool),
    )


@custom_op("torchlmoe::gather_slots")
def _gather(x_TD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
    return x_TD.index_select(0, token_M)


@_gather.register_fake
def _(x_TD, token_M, slot_TK):
    return x_TD.new_empty(token_M.shape[0], *x_TD.shape[1:])


@custom_op("torchlmoe::sum_slots")
def _sum(x_MD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
    if slot_TK.shape[1] == 1:
        return x_MD.index_select(0, slot_TK[:, 0])
    # Gathers and sums without writing the gathered rows; low precisions are summed in float32.
    return F.embedding_bag(slot_TK, x_MD.contiguous(), mode="sum")


@_sum.register_fake
def _(x_MD, token_M, slot_TK):
    return x_MD.new_empty(slot_TK.shape[0], *x_MD.shape[1:])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


torch.library.register_autograd(
    "torchlmoe::gather_slots",
    lambda ctx, grad: (_sum(grad, *ctx.saved_tensors), None, None),
    setup_context=_setup_context,
)
torch.library.register_autograd(
    "torchlmoe::sum_slots",
    lambda ctx, grad: (_gather(grad, *ctx.saved_tensors), None, None),
    setup_context=_setup_context,
)


@operation
def gather_slots(x_TD: Tensor, slots: Slots) -> Tensor:
    """Dispatch: x [T, D] -> [M, D], the token of each slot."""
    if kernels_serve("auto", x_TD):
        from torchlmoe.kernels import moe_permute as kernels

        return kernels.permute(x_TD, slots.token_M, slots.slot_TK)
    return _gather(x_TD, slots.token_M, slots.slot_TK)


@operation
def sum_slots(x_MD: Tensor, slots: Slots) -> Tensor:
    """Combine: x [M, D] -> [T, D], the sum over each token's slots, accumulated in at least float32, in x's dtype."""
    if kernels_serve("auto", x_MD):
        from torchlmoe.kernels import moe_permute as kernels

        return kernels.unpermute(x_MD, slots.token_M, slots.slot_TK, None)
    return _sum(x_MD, slots.token_M, slots.slot_TK)


@operation
def permute_slots(x_MD: Tensor, old: Slots, new: Slots) -> Tensor:
    """x [M, D] in the order of `old` -> in the order of `new`. Both are of the same choices; `new` has no padding."""
    if old.padding_M is not None:
        x_MD = x_MD.masked_fill(old.padding_M[:, None], 0)  # their gradient is zero too
    source_M, target_M = old.slot_TK.flatten()[new.choice_M], new.slot_TK.flatten()[old.choice_M]
    return _gather(x_MD, source_M, target_M[:, None])


@operation
def reorder_choices(x_TK: Tensor, slots: Slots) -> Tensor:
    """x [T, K] -> [M]: one number per choice, in the order of slots; zero for padding."""
    x_M = _gather(x_TK.flatten(), slots.choice_M, slots.slot_TK.view(-1, 1))  # as tokens with one choice each
    return x_M if slots.padding_M is None else x_M.masked_fill(slots.padding_M, 0)
