"""The MoE layer of Qwen2-MoE, which Qwen3-Next has too, in transformers and in its files."""

from torchlmoe.interop import moe
from torchlmoe.interop.rules import Rule


def moe_rules(*, separate_experts: int | None = None) -> list[Rule]:
    """Qwen2MoeSparseMoeBlock <-> `MoE` with a gated shared expert. As `moe.moe_rules` says."""
    return moe.moe_rules(shared_expert="shared_expert", shared_expert_gate=True, separate_experts=separate_experts)
