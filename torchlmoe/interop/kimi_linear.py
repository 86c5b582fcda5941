"""Kimi-Linear in transformers and in its files: Kimi Delta Attention, latent attention and the MoE layer."""

from torchlmoe.interop import deepseek_v2, moe
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Flatten, Split


def kda_rules(*, num_heads: int, head_dim: int, conv_size: int, saved: bool = False) -> list[Rule]:
    """KimiLinearDeltaAttention <-> `kda`.

    saved: as saved in files, where the three convolutions are separate and the decay has no module of its own.
    """
    convolutions = ["q_conv.weight", "k_conv.weight", "v_conv.weight"]
    one = Flatten((1, conv_size), dim=1)  # [channels, 1, conv_size] -> [channels, conv_size]
    if saved:
        decay = ""
        convolution_rules = [Rule(f"{ours[0]}_conv1d.weight", ours, one) for ours in convolutions]
    else:
        decay = "forget_gate."
        convolution_rules = [Rule("conv1d.weight", convolutions, one, Split((num_heads * head_dim,) * 3))]
    return [
        *convolution_rules,
        Rule("q_proj.weight", "q_proj.weight"),
        Rule("k_proj.weight", "k_proj.weight"),
        Rule("v_proj.weight", "v_proj.weight"),
        Rule(f"{decay}f_a_proj.weight", "decay_proj.down_proj.weight"),
        Rule(f"{decay}f_b_proj.weight", "decay_proj.up_proj.weight"),
        Rule(f"{decay}A_log", "decay.A_log", Flatten((1, 1, num_heads, 1))),
        Rule(f"{decay}dt_bias", "decay.dt_bias"),
        Rule("b_proj.weight", "b_proj.weight"),
        Rule("g_a_proj.weight", "gate_proj.down_proj.weight"),
        Rule("g_b_proj.weight", "gate_proj.up_proj.weight"),
        Rule("o_norm.weight", "norm.weight"),
        Rule("o_proj.weight", "o_proj.weight"),
    ]


def latent_attention_rules(
    *, head_dim: int, shared_key_dim: int, kv_rank: int, full_rank_q: bool = False
) -> list[Rule]:
    """KimiLinearAttention <-> `attention` with kv_rank and rotary_fraction = 0: DeepSeek-V2's without rotary phases."""
    return deepseek_v2.latent_attention_rules(
        head_dim=head_dim, shared_key_dim=shared_key_dim, kv_rank=kv_rank, full_rank_q=full_rank_q, rotary=False
    )


def moe_rules(*, separate_experts: int | None = None) -> list[Rule]:
    """KimiLinearMoE <-> `MoE` with shared experts and loss-free balance. As `moe.moe_rules` says."""
    return moe.moe_rules(
        shared_expert="shared_experts", loss_free=True, separate_experts=separate_experts, expert_names=moe.NUMBERED
    )
