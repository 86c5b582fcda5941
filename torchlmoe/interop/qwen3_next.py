"""The mixers of Qwen3-Next in transformers: Gated DeltaNet and gated attention. Its MoE layer is that of Qwen2-MoE."""

from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Flatten, Split


def gated_deltanet_rules(
    *, num_heads: int, num_key_heads: int, key_dim: int, value_dim: int, conv_size: int
) -> list[Rule]:
    """Qwen3NextGatedDeltaNet <-> `gated_deltanet`. key_dim, value_dim: the widths of one head."""
    shared = num_heads // num_key_heads  # value heads of a key head
    key_width, value_width = num_key_heads * key_dim, num_heads * value_dim
    return [
        # Theirs projects, for each key head, its q and k and its value heads' v and z; and their b and a.
        Rule(
            "in_proj_qkvz.weight",
            ["q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight"],
            Split((key_dim, key_dim, shared * value_dim, shared * value_dim), groups=num_key_heads),
        ),
        Rule("in_proj_ba.weight", ["b_proj.weight", "a_proj.weight"], Split((shared, shared), groups=num_key_heads)),
        Rule(
            "conv1d.weight",
            ["q_conv.weight", "k_conv.weight", "v_conv.weight"],
            Flatten((1, conv_size), dim=1),
            Split((key_width, key_width, value_width)),
        ),
        Rule("A_log", "decay.A_log"),
        Rule("dt_bias", "decay.dt_bias"),
        Rule("norm.weight", "norm.weight"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]


def gated_attention_rules(*, num_heads: int, head_dim: int) -> list[Rule]:
    """Qwen3NextAttention <-> `attention` with qk_norm, output_gate and zero_centered_norm."""
    return [
        # Theirs projects, for each head, q and then its gate.
        Rule("q_proj.weight", ["q_proj.weight", "gate_proj.weight"], Split((head_dim, head_dim), groups=num_heads)),
        Rule("k_proj.weight", "k_proj.weight"),
        Rule("v_proj.weight", "v_proj.weight"),
        Rule("o_proj.weight", "o_proj.weight"),
        Rule("q_norm.weight", "q_norm.weight"),
        Rule("k_norm.weight", "k_norm.weight"),
    ]
