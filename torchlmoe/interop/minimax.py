"""Lightning attention of MiniMax in transformers. Its MoE layer is that of Mixtral."""

from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Split

# Buffers of their layer that follow from its settings. No rule takes them: leave them out of what is converted.
CONSTANTS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


def lightning_rules(*, num_heads: int, head_dim: int) -> list[Rule]:
    """MiniMaxLightningAttention <-> `lightning`. Theirs projects q, k and v of a head together."""
    return [
        Rule(
            "qkv_proj.weight",
            ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
            Split((head_dim,) * 3, groups=num_heads),
        ),
        Rule("output_gate.weight", "gate_proj.weight"),
        Rule("norm.weight", "norm.weight"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]
