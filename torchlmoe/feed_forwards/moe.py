"""The mixture-of-experts layer: route, dispatch, experts, combine, plus the shared experts.

Settings for the routing of published models:

    Mixtral       score_function="softmax", normalize_top_k=True
    Qwen2-MoE     score_function="softmax", normalize_top_k=False, shared_expert_dim=..., shared_expert_gate=True
    DeepSeek-V2   score_function="softmax", normalize_top_k=False, num_shared_experts=2, group_score="max", ...
    DeepSeek-V3   score_function="sigmoid", normalize_top_k=True, balance="loss_free", group_score="top2_sum", ...

Legend: T tokens, D width, E experts, K experts per token, M = T * K slots.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.feed_forwards.experts import Experts
from torchlmoe.layers.initialization import normal_
from torchlmoe.layers.linear import Linear
from torchlmoe.layers.mlp import MLP, Activation
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.ops.grouped_matmul import run_alignment
from torchlmoe.options import InitStd
from torchlmoe.routing.balance import LoadBalance, RoutedLayer
from torchlmoe.routing.dispatch import Slots, gather_slots, reorder_choices, sum_slots
from torchlmoe.routing.exchange import Exchange
from torchlmoe.routing.router import Router


class MoE(RoutedLayer, FeedForward):
    """x [B, T, dim] -> like x: the sum of a token's routed experts and of shared experts, which process every token.

    With a capacity, an expert processes at most ceil(capacity_factor * top_k * T / num_experts) tokens of a microbatch,
    the first ones in token order, as in Switch (arXiv 2101.03961). Further choices get weight zero and are counted as
    dropped; the token's other weights do not change. Padding does not count among the T tokens and takes no capacity.
    Evaluation and decoding drop nothing, since a token's output must not depend on other tokens of the batch.

    After each optimizer step pass the step's counts to `end_step`. Raises ValueError for settings that contradict each
    other.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: Annotated[int, Field(ge=1, description="Routed experts.")] = 16,
        top_k: Annotated[int, Field(ge=1, description="Experts per token.")] = 4,
        expert_dim: Annotated[int, Field(ge=1, description="Hidden width of an expert.")] = 128,
        activation: Activation = "swiglu",
        latent_dim: Annotated[
            int | None,
            Field(ge=1, description="Width of tokens in routed experts (Nemotron-3); model.dim if unset."),
        ] = None,
        num_shared_experts: Annotated[int, Field(ge=0, description="Shared experts, which process every token.")] = 0,
        shared_expert_dim: Annotated[
            int | None,
            Field(ge=1, description="Total hidden width of shared experts; num_shared_experts * expert_dim if unset."),
        ] = None,
        shared_expert_gate: Annotated[
            bool, Field(description="Sigmoid gate on the shared experts (Qwen2-MoE).")
        ] = False,
        score_function: Annotated[Literal["softmax", "sigmoid"], Field(description="Router scores.")] = "softmax",
        normalize_top_k: Annotated[
            bool, Field(description="Normalize the weights of a token's experts to sum to one.")
        ] = True,
        num_expert_groups: Annotated[int, Field(ge=1, description="Groups of experts (DeepSeek).")] = 1,
        num_limited_groups: Annotated[int, Field(ge=1, description="Groups that a token may choose from.")] = 1,
        group_score: Annotated[
            Literal["max", "top2_sum"],
            Field(description="Score of a group, as in DeepSeek-V2 (max) or DeepSeek-V3 (top2_sum)."),
        ] = "max",
        routed_scaling_factor: Annotated[
            float, Field(ge=1e-3, le=1000, description="Multiplies the routed experts' weights.")
        ] = 1.0,
        capacity_factor: Annotated[
            float | None,
            Field(
                ge=0.01,
                le=1000,
                description="Capacity of an expert, relative to an even share, in training; dropless if unset.",
            ),
        ] = None,
        balance: Annotated[
            Literal["aux_loss", "loss_free", "none"], Field(description="Method that balances the load of experts.")
        ] = "aux_loss",
        aux_loss_weight: Annotated[float, Field(ge=0, le=1000, description="Weight of the balance loss.")] = 1e-2,
        aux_loss_scope: Annotated[
            Literal["sequence", "global_batch"],
            Field(description="Tokens over which the balance loss computes the load."),
        ] = "sequence",
        z_loss_weight: Annotated[
            float, Field(ge=0, le=1000, description="Weight of the router z-loss (arXiv 2202.08906).")
        ] = 0.0,
        bias_update_rate: Annotated[
            float, Field(ge=1e-9, le=10, description="Step size of the loss-free bias (arXiv 2408.15664).")
        ] = 1e-3,
        init_std: InitStd = 0.02,
    ):
        super().__init__()
        self.check_choices(
            score_function=score_function, group_score=group_score, balance=balance, aux_loss_scope=aux_loss_scope,
            activation=activation,
        )  # fmt: skip
        _check_groups(num_experts, top_k, num_expert_groups, num_limited_groups, group_score)
        shared_dim = num_shared_experts * expert_dim if shared_expert_dim is None else shared_expert_dim
        if shared_expert_gate and shared_dim == 0:
            raise ValueError("shared_expert_gate has no shared expert to gate: set num_shared_experts.")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor = {capacity_factor} must be positive, or None for no drops.")
        for name, value in {"aux_loss_weight": aux_loss_weight, "z_loss_weight": z_loss_weight}.items():
            if value < 0:
                raise ValueError(f"{name} = {value} must not be negative: it would reward imbalance.")
        if balance == "loss_free" and bias_update_rate <= 0:
            raise ValueError(f"bias_update_rate = {bias_update_rate} must be positive with balance = 'loss_free'.")
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.bias_update_rate = bias_update_rate
        self.init_std = init_std
        self.router = Router(
            dim,
            num_experts=num_experts,
            top_k=top_k,
            score_function=score_function,
            normalize_top_k=normalize_top_k,
            num_expert_groups=num_expert_groups,
            num_limited_groups=num_limited_groups,
            group_score=group_score,
            routed_scaling_factor=routed_scaling_factor,
            with_bias=balance == "loss_free",
            init_std=init_std,
        )
        width = latent_dim or dim
        self.experts = Experts(width, expert_dim, num_experts, activation=activation, init_std=init_std)
        self.to_latent = None if latent_dim is None else Linear(dim, latent_dim)
        self.from_latent = None if latent_dim is None else Linear(latent_dim, dim)
        self.load_balance = LoadBalance(
            num_experts,
            aux_loss_weight=aux_loss_weight if balance == "aux_loss" else 0.0,
            aux_loss_scope=aux_loss_scope,
            z_loss_weight=z_loss_weight,
        )
        self.exchange: Exchange | None = None  # set if the experts are split over ranks
        self.shared_expert = MLP(dim, shared_dim, activation=activation, init_std=init_std) if shared_dim else None
        self.shared_expert_gate = Linear(dim, 1) if shared_expert_gate else None

    def init_weights(self) -> None:
        self.router.init_weights()
        self.experts.init_weights()
        self.load_balance.init_weights()
        if self.shared_expert is not None:
            self.shared_expert.init_weights()
        for layer in (self.shared_expert_gate, self.to_latent, self.from_latent):
            if layer is not None:
                normal_(layer.weight, self.init_std)

    def forward(self, x: Tensor, *, sequence: SequenceLayout) -> Tensor:
        x_TD = x.flatten(0, 1)
        routing = self.router(x_TD)
        alignment = run_alignment(x)
        slots = Slots.sorted_by_expert(routing.expert_TK, self.num_experts, alignment if self.exchange is None else 1)
        weight_TK, dropped = routing.weight_TK, slots.offset_E.new_zeros((), dtype=torch.int64)
        if self.capacity_factor is not None and self.training:
            beyond_TK = self._beyond_capacity(routing.expert_TK, slots, sequence.counted_T())
            weight_TK, dropped = weight_TK.masked_fill(beyond_TK, 0.0), beyond_TK.sum()
        if self.training and sequence.share.loss_weight and torch.is_grad_enabled():
            weight_TK = self.load_balance(weight_TK, routing, dropped, sequence)
        latent_TD = x_TD if self.to_latent is None else self.to_latent(x_TD)
        x_MD, weight_M = gather_slots(latent_TD, slots), reorder_choices(weight_TK, slots)
        if self.exchange is None:
            shared = self._shared(x)
            y_MD = self.experts(x_MD, weight_M, slots.offset_E)
        else:
            arriving = self.exchange.send(x_MD, weight_M, slots.offset_E)
            shared = self._shared(x)  # while tokens are sent
            x_MD, weight_M, arrived = self.exchange.sort(arriving, alignment)
            y_MD = self.experts(x_MD, weight_M, arrived.offset_E)
            y_MD = self.exchange.send_back(y_MD, arrived, arriving)
        y_TD = sum_slots(y_MD, slots)
        y = (y_TD if self.from_latent is None else self.from_latent(y_TD)).view_as(x)
        return y if shared is None else y + shared

    def _shared(self, x: Tensor) -> Tensor | None:
        if self.shared_expert is None:
            return None
        shared = self.shared_expert(x)
        return shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared

    def _beyond_capacity(self, expert_TK: Tensor, slots: Slots, counted_T: Tensor) -> Tensor:
        """bool [T, K]: choices beyond their expert's capacity. Padding takes no capacity and is never dropped.

        Places are counted over the whole microbatch, whose earlier tokens may be on other ranks.
        """
        assert self.capacity_factor is not None
        place_TK, num_tokens = slots.place_TK(expert_TK, counted_T), counted_T.sum()
        mesh = self.load_balance.mesh
        if mesh is not None:
            counted_TK = counted_T[:, None].expand_as(expert_TK).long()
            count_E = counted_TK.new_zeros(self.num_experts).scatter_add(0, expert_TK.flatten(), counted_TK.flatten())
            count_PE = all_gather_tensor(count_E[None], 0, mesh)
            place_TK = place_TK + count_PE[: mesh.get_local_rank()].sum(0)[expert_TK]
            num_tokens = count_PE.sum() // self.top_k
        capacity = (self.capacity_factor * self.top_k * num_tokens.double() / self.num_experts).ceil()
        return (place_TK >= capacity) & counted_T[:, None]

    @torch.no_grad()
    def end_step(self, counts_E: Tensor) -> None:
        """Keep the counts for the "global_batch" loss. With balance = "loss_free", take a step of the bias.

        The bias follows arXiv 2408.15664. counts_E: see `RoutedLayer.end_step`.
        """
        super().end_step(counts_E)
        bias_E = self.router.expert_bias
        if bias_E is not None:
            # E * (mean - count), in integers, so that the bias of an expert whose load is the mean does not move.
            shortage_E = counts_E.sum() - self.num_experts * counts_E
            bias_E.add_(shortage_E.sign().to(bias_E.dtype), alpha=self.bias_update_rate)

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token: the router, the chosen experts and the shared ones."""
        flops = self.router.flops_per_token() + self.top_k * self.experts.flops_per_row()
        if self.shared_expert is not None:
            flops += self.shared_expert.flops_per_token()
        for layer in (self.shared_expert_gate, self.to_latent, self.from_latent):
            flops += 0 if layer is None else 2 * layer.weight.numel()
        return flops

    def idle_parameters(self) -> int:
        routed = sum(parameter.numel() for parameter in self.experts.parameters())
        return routed // self.num_experts * (self.num_experts - self.top_k)


def _check_groups(
    num_experts: int, top_k: int, num_expert_groups: int, num_limited_groups: int, group_score: str
) -> None:
    if num_expert_groups < 1 or num_experts % num_expert_groups:
        raise ValueError(
            f"num_experts = {num_experts} does not split into num_expert_groups = {num_expert_groups} equal "
            "groups: choose a divisor."
        )
    if not 1 <= num_limited_groups <= num_expert_groups:
        raise ValueError(
            f"num_limited_groups = {num_limited_groups} must lie between 1 and num_expert_groups = {num_expert_groups}."
        )
    group_size = num_experts // num_expert_groups
    if not 1 <= top_k <= num_limited_groups * group_size:
        raise ValueError(
            f"top_k = {top_k} must lie between 1 and the {num_limited_groups * group_size} experts that a "
            f"token can choose from ({num_limited_groups} of {num_expert_groups} groups of {group_size})."
        )
    if group_score == "top2_sum" and num_limited_groups < num_expert_groups and group_size < 2:
        raise ValueError("group_score = 'top2_sum' needs at least two experts in a group: use 'max'.")
