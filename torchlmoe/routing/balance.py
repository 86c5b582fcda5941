"""Balances and counts the loads of experts (or memories).

There are three methods: the Switch auxiliary loss (arXiv 2101.03961), over the global batch (arXiv 2501.11873) or per
row as in DeepSeek-V2 (arXiv 2405.04434); the router z-loss (arXiv 2202.08906); and the loss-free bias (arXiv
2408.15664).

    auxiliary loss = aux_loss_weight * E * sum_e f_e P_e
    z-loss         = z_loss_weight * mean_t logsumexp(logits_t)^2

with f_e the fraction of choices that fell on expert e and P_e the mean probability of e. With balanced loads both are
1 / E, and the auxiliary loss is `aux_loss_weight`. Over the global batch, f_e is that of the last complete optimizer
step: that of the current step is not known before its last microbatch has been routed, on any rank or pipeline stage.
f_e is a constant for the gradient, so it needs no communication and does not depend on how a batch is cut.

The losses are not added to the main loss. The backward injects their gradients, times the microbatch's share of the
step's tokens, so they need no path through the model's outputs or between pipeline stages. The backward also counts:
the counts are a gradient that `backward()` accumulates in a buffer (`torch.autograd.grad` does not). So they are
counted once per microbatch, with or without recompute, and not in evaluation.

Legend: T tokens, K experts per token, E experts, M = T * K slots.
"""

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.routing.router import Routing


class _InjectAndCount(torch.autograd.Function):
    """Returns x. In the backward `losses` receive the gradient `loss_weight`, and `counters` the gradient `counted`.

    So autograd accumulates counts over microbatches as it does gradients.
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
    """A layer with a router, whose `load_balance` counts and balances its loads.

    Training sums the results of `pop_counters` over ranks and, after each optimizer step, passes the counts to
    `end_step`.
    """

    load_balance: "LoadBalance"

    def pop_counters(self) -> dict[str, Tensor]:
        """Return this rank's counters since the last call, and reset them. The caller sums them over ranks.

        counts: int64 [E], choices per expert or memory, including dropped ones. dropped: int64 [], dropped choices.
        aux_loss, z_loss: float64 [], times their weights, summed over microbatches in proportion to `loss_weight`.
        """
        return self.load_balance.pop_counters()

    def end_step(self, counts_E: Tensor) -> None:
        """Update the balance after an optimizer step. counts_E: int64 [E], the step's choices summed over all ranks."""
        self.load_balance.end_step(counts_E)


class LoadBalance(nn.Module):
    """Holds one layer's counters and computes its balance losses.

    Padding (`sequence.share.counted`) adds nothing to either, so a token's weight does not depend on padding beside it.
    aux_loss_scope: "global_batch" (f_e over all tokens of the last step) or "sequence" (f and P per row of
    `sequence.share.row_length` tokens, then the mean over rows). A weight of zero turns the loss off.
    mesh: the ranks that have the spans of a microbatch, if it is split.
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
        # Its gradient has the counts: choices per expert, drops, the two losses. float64 counts exactly up to 2^53.
        counters = torch.zeros(num_experts + 3, dtype=torch.float64, requires_grad=True)
        self.register_buffer("counters", counters, persistent=False)
        # Counts of the last step over all ranks. They are saved with the model if the loss depends on them.
        global_batch = aux_loss_weight > 0 and aux_loss_scope == "global_batch"
        self.register_buffer("last_counts", torch.ones(num_experts, dtype=torch.int64) if global_batch else None)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Moving or casting returns a tensor that is not a leaf, in which autograd would not accumulate.
        self.counters = self.counters.detach().double().requires_grad_()
        return self

    def init_weights(self) -> None:
        """Reset the counters, and assume equal loads before the first step."""
        self.pop_counters()
        if self.last_counts is not None:
            self.last_counts.fill_(1)

    def end_step(self, counts_E: Tensor) -> None:
        """See `RoutedLayer.end_step`."""
        if self.last_counts is not None:
            self.last_counts.copy_(counts_E)

    def pop_counters(self) -> dict[str, Tensor]:
        """See `RoutedLayer.pop_counters`."""
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
        """Return x. Its backward injects the gradients of this microbatch's losses and counts its choices.

        dropped: int64 [], number of dropped choices.
        """
        if x.shape[0] == 0:  # without tokens, means would be NaN
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
            # The mean of the microbatch. Times loss_weight and summed over the step, it is the mean of the batch.
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
        # Rows have equal length, so the mean over tokens is the mean over rows, and each span contributes its share.
        return self.num_experts * (fraction_TE * probability_TE).sum(-1).mean()


def _counted(x: Tensor, sequence: SequenceLayout) -> Tensor:
    """x [T] or [T, E] with zeros for padding."""
    if sequence.share.counted is None:
        return x
    padding_T = ~sequence.counted_T()
    return x.masked_fill(padding_T.view(-1, *[1] * (x.dim() - 1)), 0)


def _count(choice_TK: Tensor, counted_T: Tensor, num_bins: int, dtype: torch.dtype) -> Tensor:
    """Number of choices of counted tokens per bin, [num_bins]."""
    ones_M = counted_T[:, None].expand_as(choice_TK).flatten().to(dtype)
    return ones_M.new_zeros(num_bins).scatter_add(0, choice_TK.flatten(), ones_M)
