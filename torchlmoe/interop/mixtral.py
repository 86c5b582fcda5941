"""The MoE layer of Mixtral in transformers and in its files."""

from torchlmoe.interop import moe
from torchlmoe.interop.rules import Rule


def moe_rules(*, separate_experts: int | None = None) -> list[Rule]:
    """MixtralSparseMoeBlock <-> `MoE`. As `moe.moe_rules` says."""
    return moe.moe_rules(separate_experts=separate_experts, expert_names=moe.NUMBERED)
