"""DeepSeek-V2 in transformers: latent attention, and the MoE layer, which DeepSeek-V3 has too but for a bias."""

from torchlmoe.interop import moe
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Reorder, Split


def latent_attention_rules(
    *, head_dim: int, shared_key_dim: int, kv_rank: int, full_rank_q: bool = False, rotary: bool = True
) -> list[Rule]:
    """DeepseekV2Attention <-> `attention` with kv_rank.

    head_dim: width of a key, the shared_key_dim channels of all heads included. full_rank_q: whether q has one
    projection, as where q_lora_rank is null. rotary: whether the shared channels are turned; Kimi-Linear's are not.
    """
    shared = list(range(shared_key_dim))
    if rotary:
        shared = shared[::2] + shared[1::2]  # theirs turns neighbours, ours halves
    own_dim = head_dim - shared_key_dim
    # The shared channels stand last in a head of theirs and first in one of ours.
    head = Reorder((*(own_dim + channel for channel in shared), *range(own_dim)))
    latent = Reorder((*range(kv_rank), *(kv_rank + channel for channel in shared)))
    if full_rank_q:
        q_rules = [Rule("q_proj.weight", "q_proj.weight", head)]
    else:
        q_rules = [
            Rule("q_a_proj.weight", "q_proj.down_proj.weight"),
            Rule("q_a_layernorm.weight", "q_proj.activation.weight"),
            Rule("q_b_proj.weight", "q_proj.up_proj.weight", head),
        ]
    return [
        *q_rules,
        Rule(
            "kv_a_proj_with_mqa.weight",
            ["latent.down_proj.weight", "latent.shared_key_proj.weight"],
            latent,
            Split((kv_rank, shared_key_dim)),
        ),
        Rule("kv_a_layernorm.weight", "latent.norm.weight"),
        Rule("kv_b_proj.weight", "latent.up_proj.weight"),
        Rule("o_proj.weight", "o_proj.weight"),
    ]


def moe_rules(*, loss_free: bool = False, separate_experts: int | None = None) -> list[Rule]:
    """DeepseekV2Moe <-> `MoE` with shared experts; with loss_free, DeepseekV3MoE. As `moe.moe_rules` says."""
    return moe.moe_rules(shared_expert="shared_experts", loss_free=loss_free, separate_experts=separate_experts)
