"""Keeps the experts (or memories) that a router chooses from evenly loaded, and counts how evenly they are.

Three remedies: the Switch auxiliary loss (arXiv 2101.03961), over the global batch (arXiv 2501.11873) or per row as
in DeepSeek-V2 (arXiv 2405.04434); the router z-loss (arXiv 2202.08906); and the loss-free bias (arXiv 2408.15664).

    auxiliary loss = aux_loss_weight * E * sum_e f_e P_e
    z-loss         = z_loss_weight * mean_t logsumexp(logits_t)^2

with f_e the fraction of choices that fell on expert e and P_e the mean probability of e. Both are 1 / E for
each e when balanced, where the auxiliary loss is `aux_loss_weight`. Over the global batch, f_e is that of the last
complete optimizer step: that of the current step is not known before its last microbatch has been routed, on any rank
or pipeline stage. f_e is a constant for the gradient, so it needs no communication and does not depend on how a batch
is cut.

The losses are not added to the main loss: the backward injects their gradients, times the microbatch's
share of the step's tokens, so they need no path through the model's outputs or between pipeline stages.
The backward also counts, as a gradient that `backward()` accumulates in a buffer (`torch.autograd.grad` does
not): once per microbatch, with or without recompute, and not in evaluation.

Legend: T tokens, K experts per token, E experts, M = T * K slots.
"""

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.routing.router import Routing


class _InjectAndCount(torch.autograd.Function):
    """Return `x`; in the backward `losses` receive the gradient `loss_weight`, and `counters` the gradient `counted`.

    So autograd accumulates the counts over microbatches like gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, losses: Tensor, counters: Tensor, counted: Tensor, loss_weight: float) -> Tensor:
        ctx.save_for_backward(losses, counted)
        ctx.loss_weight = loss_weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        losses, counted = ctx.saved_tensors
        return grad, torch.full_like(losses, ctx.loss_weight), counted, None, None


class RoutedLayer:
    """A layer with a router whose load is counted and balanced, by its `load_balance`.

    Training sums what `pop_counters` returns over ranks and, after each optimizer step, hands the counts to `end_step`.
    """

    load_balance: "LoadBalance"

    def pop_counters(self) -> dict[str, Tensor]:
        """What this rank counted since the last call, to be summed over ranks, and resets it.

        counts: int64 [E], choices per expert or memory, drops included. dropped: int64 []. aux_loss, z_loss: float64
        [], with their weights, summed over the step's microbatches in proportion to their `loss_weight`.
        """
        return self.load_balance.pop_counters()

    def end_step(self, counts_E: Tensor) -> None:
        """counts_E int64 [E]: the step's choices per expert or memory, over all ranks."""
        self.load_balance.end_step(counts_E)


class LoadBalance(nn.Module):
    """Holds one layer's counters and computes its balancing losses.

    Padding (`sequence.share.counted`) adds nothing to either: a token weighs the same whatever padding is beside it.
    aux_loss_scope: "global_batch" (f_e over all tokens of the last step) or "sequence" (f and P per row of
    `sequence.share.row_length` tokens, then the mean over rows). A weight of zero leaves that loss out.
    mesh: of the ranks that hold the spans of a microbatch, if it is split.
    """

    counters: Tensor
    last_counts: Tensor | None
    mesh: DeviceMesh | None = None

    def __init__(self, num_experts: int, *, aux_loss_weight: float, aux_loss_scope: str, z_loss_weight: float):
        super().__init__()
        self.num_experts = num_experts
        self.aux_loss_weight = aux_loss_weight
        self.aux_loss_scope = aux_loss_scope
        self.z_loss_weight = z_loss_weight
        # Its gradient is what was counted: choices per expert, drops, the two losses; float64 counts exactly to 2^53.
        counters = torch.zeros(num_experts + 3, dtype=torch.float64, requires_grad=True)
        self.register_buffer("counters", counters, persistent=False)
        # Of the last step over all ranks; part of the model's state where it matters.
        global_batch = aux_loss_weight > 0 and aux_loss_scope == "global_batch"
        self.register_buffer("last_counts", torch.ones(num_experts, dtype=torch.int64) if global_batch else None)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # A moved or cast tensor is no leaf, at which gradients would gather.
        self.counters = self.counters.detach().double().requires_grad_()
        return self

    def init_weights(self) -> None:
        """Nothing counted, and an even load before the first step."""
        self.pop_counters()
        if self.last_counts is not None:
            self.last_counts.fill_(1)

    def end_step(self, counts_E: Tensor) -> None:
        """counts_E int64 [E]: the step's choices per expert over all ranks."""
        if self.last_counts is not None:
            self.last_counts.copy_(counts_E)

    def pop_counters(self) -> dict[str, Tensor]:
        """What this rank counted since the last call; sums over ranks are the step's."""
        counted = torch.zeros_like(self.counters) if self.counters.grad is None else self.counters.grad
        self.counters.grad = None
        counts, (dropped, aux_loss, z_loss) = counted[:-3], counted[-3:]
        return {"counts": counts.long(), "dropped": dropped.long(), "aux_loss": aux_loss, "z_loss": z_loss}

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        dropped: Tensor,
        sequence: SequenceLayout,
    ) -> Tensor:
        """Returns x, through which this microbatch's loss gradients are injected and its choices counted."""
        if x.shape[0] == 0:  # no tokens: nothing to balance, and means over none are not numbers
            return x
        aux_loss = z_loss = routing.logits_TE.new_zeros(())
        counted_T = sequence.counted_T()
        if self.aux_loss_weight:
            aux_loss = self.aux_loss_weight * self._switch_loss(routing, counted_T, sequence)
        if self.z_loss_weight:
            z_loss = self.z_loss_weight * _counted(routing.logits_TE.logsumexp(-1).square(), sequence).mean()
        losses = torch.stack([aux_loss, z_loss])
        weighted = losses.detach().double() * sequence.share.loss_weight
        count_E = _count(routing.expert_TK, counted_T, self.num_experts, torch.float64)
        counted = torch.cat([count_E, dropped.double()[None], weighted])
        return _InjectAndCount.apply(x, losses, self.counters, counted, sequence.share.loss_weight)

    def _switch_loss(self, routing: Routing, counted_T: Tensor, sequence: SequenceLayout) -> Tensor:
        probability_TE, expert_TK = _counted(routing.probability_TE, sequence), routing.expert_TK
        if self.last_counts is not None:
            fraction_E = self.last_counts.to(probability_TE.dtype) / self.last_counts.sum().clamp(min=1)
            # The microbatch's own mean: times loss_weight and summed over the step, it is the whole mean.
            return self.num_experts * (fraction_E * probability_TE.mean(0)).sum()
        num_tokens = len(expert_TK)
        length, all_tokens = sequence.share.row_length, num_tokens * (1 if self.mesh is None else self.mesh.size())
        if length is None or all_tokens % length:
            raise ValueError(
                f"aux_loss_scope = 'sequence' needs sequence.share.row_length to divide the {all_tokens} tokens of the "
                f"microbatch, got {length}: give whole rows or use 'global_batch'."
            )
        row_T = (sequence.start + torch.arange(num_tokens, device=expert_TK.device)) // length
        choice_TK, num_rows = row_T[:, None] * self.num_experts + expert_TK, all_tokens // length
        counts = _count(choice_TK, counted_T, num_rows * self.num_experts, probability_TE.dtype)
        if self.mesh is not None:
            counts = all_reduce(counts, "sum", self.mesh)
        counts_RE = counts.view(num_rows, self.num_experts)
        fraction_TE = (counts_RE / counts_RE.sum(-1, keepdim=True).clamp(min=1))[row_T]
        # Rows are of one length: the mean over tokens is that over the rows' means, and a span's share of it a span's.
        return self.num_experts * (fraction_TE * probability_TE).sum(-1).mean()


def _counted(x: Tensor, sequence: SequenceLayout) -> Tensor:
    """x [T] or [T, E], zero where a token is padding."""
    if sequence.share.counted is None:
        return x
    padding_T = ~sequence.counted_T()
    return x.masked_fill(padding_T.view(-1, *[1] * (x.dim() - 1)), 0)


def _count(choice_TK: Tensor, counted_T: Tensor, num_bins: int, dtype: torch.dtype) -> Tensor:
    """How many choices of counted tokens fell on each bin."""
    ones_M = counted_T[:, None].expand_as(choice_TK).flatten().to(dtype)
    return ones_M.new_zeros(num_bins).scatter_add(0, choice_TK.flatten(), ones_M)
