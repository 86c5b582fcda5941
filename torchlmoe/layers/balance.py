"""Keeps the experts (or memories) that a router chooses from evenly loaded, and counts how evenly they are.

Three remedies: the Switch auxiliary loss (arXiv 2101.03961), over the global batch (arXiv 2501.11873) or per row as
in DeepSeek-V2 (arXiv 2405.04434); the router z-loss (arXiv 2202.08906); and the loss-free bias (arXiv 2408.15664).

    auxiliary loss = aux_loss_weight * E * sum_e f_e P_e
    z-loss         = z_loss_weight * mean_t logsumexp(logits_t)^2

with f_e the fraction of choices that fell on expert e and P_e the mean probability of e. Both are 1 / E for
each e when balanced, where the auxiliary loss is `aux_loss_weight`. Over the global batch, f_e is that of the last
whole optimizer step: the present one's is not known before its last microbatch, on whichever rank or pipeline stage,
has been routed. f_e is a constant to the gradient in any case, and so it needs no communication of its own and does
not depend on how a batch is cut.

The losses never enter the main loss: their gradients are injected on the way back, times the microbatch's
share of the step's tokens, so they need no path through the model's outputs or between pipeline stages.
Counting happens on the way back too: once per microbatch, however often recomputation runs the forward, and
not at all in evaluation.

Legend: T tokens, K experts per token, E experts, R rows.
"""

import torch
from torch import Tensor, nn

from torchlmoe.layers.router import Routing
from torchlmoe.layers.sequence import Sequence


class _InjectAndCount(torch.autograd.Function):
    """Passes `x` through; on the way back gives the losses their gradient and adds up what was counted.

    losses: pairs (loss, total); counts: pairs (count, total), all flattened into `tensors`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, loss_weight: float, num_losses: int, *tensors: Tensor) -> Tensor:
        ctx.loss_weight, ctx.num_losses = loss_weight, num_losses
        half = len(tensors) // 2
        ctx.save_for_backward(*tensors[:half])
        # Not saved: they change before the backward runs, by the other microbatches.
        ctx.totals = tensors[half:]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values = ctx.saved_tensors
        for index, (value, total) in enumerate(zip(values, ctx.totals, strict=True)):
            total.add_(value.to(total.dtype) * ctx.loss_weight if index < ctx.num_losses else value)
        injected = [torch.full_like(loss, ctx.loss_weight) for loss in values[: ctx.num_losses]]
        return grad, None, None, *injected, *[None] * (2 * len(values) - ctx.num_losses)


class LoadBalance(nn.Module):
    """Holds one layer's counters and computes its balancing losses.

    aux_loss_scope: "global_batch" (f_e over all tokens of the last step) or "sequence" (f and P per row of
    `sequence.row_length` tokens, then the mean over rows). A weight of zero leaves that loss out.
    """

    counts: Tensor
    dropped: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    last_counts: Tensor | None

    def __init__(self, num_experts: int, *, aux_loss_weight: float, aux_loss_scope: str, z_loss_weight: float):
        super().__init__()
        self.num_experts = num_experts
        self.aux_loss_weight = aux_loss_weight
        self.aux_loss_scope = aux_loss_scope
        self.z_loss_weight = z_loss_weight
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("aux_loss", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("z_loss", torch.zeros((), dtype=torch.float64), persistent=False)
        # Of the last step over all ranks; part of the model's state where it matters.
        global_batch = aux_loss_weight > 0 and aux_loss_scope == "global_batch"
        self.register_buffer("last_counts", torch.ones(num_experts, dtype=torch.int64) if global_batch else None)

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
        totals = {name: getattr(self, name) for name in ("counts", "dropped", "aux_loss", "z_loss")}
        counters = {name: total.clone() for name, total in totals.items()}
        for total in totals.values():
            total.zero_()
        return counters

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        count_E: Tensor,
        dropped: Tensor,
        sequence: Sequence,
    ) -> Tensor:
        """Returns x, through which this microbatch's loss gradients are injected and its choices counted."""
        aux_loss = z_loss = routing.logits_TE.new_zeros(())
        if self.aux_loss_weight:
            aux_loss = self.aux_loss_weight * self._switch_loss(routing, sequence)
        if self.z_loss_weight:
            z_loss = self.z_loss_weight * routing.logits_TE.logsumexp(-1).square().mean()
        totals = (self.aux_loss, self.z_loss, self.counts, self.dropped)
        values = (aux_loss, z_loss, count_E, dropped)
        return _InjectAndCount.apply(x, sequence.loss_weight, 2, *values, *totals)

    def _switch_loss(self, routing: Routing, sequence: Sequence) -> Tensor:
        probability_TE = routing.probability_TE
        if self.last_counts is not None:
            fraction_E = self.last_counts.to(probability_TE.dtype) / self.last_counts.sum()
            # The microbatch's own mean: times loss_weight and summed over the step, it is the whole mean.
            return self.num_experts * (fraction_E * probability_TE.mean(0)).sum()
        length = sequence.row_length
        if length is None or probability_TE.shape[0] % length:
            raise ValueError(
                f"aux_loss_scope = 'sequence' needs sequence.row_length to divide the "
                f"{probability_TE.shape[0]} tokens of the microbatch, got {length}: give whole rows or use "
                "'global_batch'."
            )
        chosen_TE = torch.zeros_like(probability_TE).scatter(-1, routing.expert_TK, 1.0)
        fraction_RE = chosen_TE.unflatten(0, (-1, length)).mean(1) / routing.expert_TK.shape[1]
        probability_RE = probability_TE.unflatten(0, (-1, length)).mean(1)
        return self.num_experts * (fraction_RE * probability_RE).sum(-1).mean()
