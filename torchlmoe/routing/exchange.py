"""Sends tokens to the ranks that have their experts, and outputs to the tokens' ranks, by all-to-alls without padding.

Each of P ranks has E / P consecutive experts. A rank's slots are sorted by expert, so the rows for another rank are
contiguous. They arrive sorted by the sending rank, and the receiving rank sorts them by expert. Nothing depends on the
order in which messages arrive. A slot's routing weight is sent with it, 4 or 8 bytes beside the D numbers of its token,
and multiplies the expert's hidden activation, as without parallelism. If the sending rank applied it to the output
instead, every output would be kept for the backward.

The ranks exchange the numbers of rows once per layer and microbatch, and keep them on the host; recompute reads them
there. Only this exchange makes the host wait for a GPU. In a FakeTensorMode, where tensors have no values, all experts
get equally many rows.

Legend: P ranks, E experts, M slots of this rank, R received rows, D width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from torchlmoe.ops.fake_values import has_values
from torchlmoe.ops.operation import custom_op
from torchlmoe.routing.dispatch import Slots, gather_slots, reorder_choices, sum_slots


@dataclass(frozen=True)
class Arrived:
    """Rows from all ranks for this rank's experts. They may still be in transit.

    x_RD, weight_R: tokens and routing weights, sorted by sending rank. expert_R: int64, local expert of each row.
    sent, received: number of rows to and from each rank.
    """

    x_RD: Tensor
    weight_R: Tensor
    expert_R: Tensor
    sent: list[int]
    received: list[int]


class Exchange:
    """The all-to-alls of a layer. mesh: the P ranks. num_experts: E, a multiple of P."""

    def __init__(self, mesh: DeviceMesh, num_experts: int):
        self.mesh, self.num_local = mesh, num_experts // mesh.size()

    def send(self, x_MD: Tensor, weight_M: Tensor, offset_E: Tensor) -> Arrived:
        """Send slots x [M, D] and weight [M], sorted by expert without padding. offset_E: int32, ends of the runs."""
        count_E = offset_E.diff(prepend=offset_E.new_zeros(1)).long()
        counts = exchange_counts(count_E, self.mesh.size(), self.mesh.get_group().group_name)
        if has_values(counts):
            sent, received = (side.sum(-1).tolist() for side in counts.unbind())
            for number in (*sent, *received):
                torch._check_is_size(number)
        else:
            sent, received = self._even(len(x_MD))
        experts = torch.arange(self.num_local).repeat(self.mesh.size())
        expert_R = experts.repeat_interleave(counts[1].flatten(), output_size=sum(received))
        expert_R = expert_R.to(x_MD.device, non_blocking=True)
        x_RD = all_to_all_single_autograd(x_MD, received, sent, self.mesh)
        weight_R = all_to_all_single_autograd(weight_M, received, sent, self.mesh)
        return Arrived(x_RD, weight_R, expert_R, sent, received)

    def _even(self, num_slots: int) -> tuple[list[int], list[int]]:
        """Numbers of rows to and from each rank, if every rank has `num_slots` and all experts have equal loads."""
        each, rest = divmod(num_slots, self.mesh.size())
        sent = [each + (other < rest) for other in range(self.mesh.size())]
        return sent, [sent[self.mesh.get_local_rank()]] * self.mesh.size()

    def sort(self, arrived: Arrived, alignment: int) -> tuple[Tensor, Tensor, Slots]:
        """Sort received rows by local expert. Returns x, weight and their slots, the arguments of `Experts`."""
        slots = Slots.sorted_by_expert(arrived.expert_R[:, None], self.num_local, alignment)
        return gather_slots(arrived.x_RD, slots), reorder_choices(arrived.weight_R[:, None], slots), slots

    def send_back(self, y: Tensor, slots: Slots, arrived: Arrived) -> Tensor:
        """Send the experts' outputs to the ranks of their tokens: [M, D], in the order of the slots before `send`."""
        y_MD = all_to_all_single_autograd(sum_slots(y, slots), arrived.sent, arrived.received, self.mesh)
        if isinstance(y_MD, AsyncCollectiveTensor):
            # Selective recompute sends these rows again, but keeps the result of the operation that reads them. So
            # nothing would wait for them, and torch's registry would keep them and the block's graph alive.
            y_MD.trigger_wait()
        return y_MD


@custom_op("torchlmoe::exchange_counts")
def exchange_counts(count_E: Tensor, num_ranks: int, group_name: str) -> Tensor:
    """count int64 [E] of this rank's slots -> int64 [2, P, E / P] on the CPU: slots sent to each rank, and received."""
    sent = count_E.view(num_ranks, -1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=_resolve_process_group(group_name))  # type: ignore[arg-type]
    return torch.stack([sent, received]).cpu()


@exchange_counts.register_fake
def _(count_E, num_ranks, group_name):
    return torch.empty(2, num_ranks, count_E.shape[0] // num_ranks, dtype=torch.int64)
