"""Chooses each token's experts (or memories) and their weights: softmax or sigmoid, top-k, group-limited, biased.

Covers the routing of Mixtral (arXiv 2401.04088), Qwen2-MoE (arXiv 2407.10671), DeepSeek-V2 (arXiv 2405.04434) and
DeepSeek-V3 (arXiv 2412.19437).

Legend: T tokens, D width, E experts, K experts per token, G groups of experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlmoe.layers.initialization import normal_
from torchlmoe.ops.operation import custom_op, without_autocast


@dataclass(frozen=True)
class Routing:
    """The experts of each token.

    expert_TK: int64, distinct in each row, the highest score first. weight_TK: the factors of their outputs, at least
    float32. logits_TE, probability_TE: of all experts, in the dtype of weight_TK; a token's probabilities sum to one.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor
    probability_TE: Tensor


class Router(nn.Module):
    """x [T, D] -> Routing, computed in at least float32 for any dtype of x.

    expert_bias: float32 [E], or None without `with_bias`. It is added to the scores that choose experts, but not to
    weights: loss-free balancing (arXiv 2408.15664). It is part of the model's state.
    Settings are described in `MoE`, which checks them.
    """

    float32_island = True
    head_dims: dict[str, int] = {}
    expert_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        top_k: int,
        score_function: str = "softmax",
        normalize_top_k: bool = True,
        num_expert_groups: int = 1,
        num_limited_groups: int = 1,
        group_score: str = "max",
        routed_scaling_factor: float = 1.0,
        with_bias: bool = False,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.top_k = top_k
        self.score_function = score_function
        self.normalize_top_k = normalize_top_k
        self.num_expert_groups = num_expert_groups
        self.num_limited_groups = num_limited_groups
        self.group_score = group_score
        self.routed_scaling_factor = routed_scaling_factor
        self.init_std = init_std
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=dtype))
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32) if with_bias else None)

    def init_weights(self) -> None:
        normal_(self.weight, self.init_std)
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(self, x_TD: Tensor) -> Routing:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with without_autocast([x_TD]):
            logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        if self.score_function == "softmax":
            score_TE = probability_TE = logits_TE.softmax(-1)
        else:
            score_TE = logits_TE.sigmoid()
            probability_TE = score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)
        expert_TK = self._choose(score_TE.detach())
        weight_TK = score_TE.gather(-1, expert_TK)
        if self.normalize_top_k:
            # Sigmoid scores may all underflow to zero.
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        if self.routed_scaling_factor != 1.0:
            weight_TK = weight_TK * self.routed_scaling_factor
        return Routing(expert_TK, weight_TK, logits_TE, probability_TE)

    def _choose(self, score_TE: Tensor) -> Tensor:
        if self.expert_bias is not None:
            score_TE = score_TE + self.expert_bias
        if self.num_limited_groups < self.num_expert_groups:
            score_TGe = score_TE.unflatten(-1, (self.num_expert_groups, -1))
            if self.group_score == "max":
                group_TG = score_TGe.amax(-1)
            else:
                group_TG = score_TGe.topk(2).values.sum(-1)
            chosen = _top(group_TG, self.num_limited_groups)
            closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(-1, chosen, False)
            score_TE = score_TGe.masked_fill(closed_TG[..., None], -torch.inf).flatten(-2)
        return _top(score_TE, self.top_k)

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token."""
        return 2 * self.weight.numel()


@custom_op("torchlmoe::top_indices")
def _top(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores of the last dimension. Ties go to the lower index, which `topk` does not promise.

    It is one custom operation, so that recompute can keep the choice instead of making it again.
    """
    if score.device.type == "cpu" and score.dtype is torch.float32:
        return _top_by_keys(score, k)
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def _top_by_keys(score: Tensor, k: int) -> Tensor:
    """`_top` for float32, in a third of the time of a CPU's sort.

    The upper half of a 64-bit key is the score, mapped to an integer that sorts alike. The lower half is the number of
    places after its own. No two keys are equal, so every algorithm finds the same k largest.
    """
    last = score.shape[-1] - 1
    bits = (score + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0, which it equals
    order = bits ^ (bits >> 31 & 0x7FFFFFFF)  # reverses the order of negative numbers
    order.masked_fill_(score.isnan(), 0x7FFFFFFF)  # NaN is above all numbers, as in torch.sort
    places_after = torch.arange(last, -1, -1, device=score.device)
    key = order.long().bitwise_left_shift_(32).bitwise_or_(places_after)
    return last - (key.topk(k).values & 0xFFFFFFFF)


@_top.register_fake
def _(score, k):
    return score.new_empty(*score.shape[:-1], k, dtype=torch.int64)
