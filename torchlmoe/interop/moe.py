"""Rules for the parts that MoE layers of transformers share: router, stacked or separate experts, shared expert."""

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Flatten, Split

NAMED = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")  # the same three matrices in files of Mixtral, MiniMax and Kimi-Linear


def shared_units(layer: MoE, model_type: str) -> int:
    """Return the hidden width of the shared experts. Raises ValueError for a layer without shared experts."""
    if layer.shared_expert is None:
        raise ValueError(f"The model has no shared expert, but {model_type} always has one: choose another --format.")
    return layer.shared_expert.units


def moe_rules(
    *,
    shared_expert: str | None = None,
    shared_expert_gate: bool = False,
    loss_free: bool = False,
    separate_experts: int | None = None,
    expert_names: tuple[str, str, str] = NAMED,
    gated: bool = True,
) -> list[Rule]:
    """Return the rules between an MoE layer of transformers and `MoE`.

    shared_expert: name of the shared expert in transformers, or None without one.
    shared_expert_gate: whether the shared expert has a gate.
    loss_free: whether the router has a bias.
    separate_experts: the number of experts if each has separate matrices, as in files; None if they are stacked, as in
        transformers' modules.
    expert_names: names of these matrices.
    gated: whether an expert has a gate matrix.
    """
    first = "gate_up_proj" if gated else "up_proj"
    rules = [Rule("gate.weight", "router.weight")]
    if separate_experts is None:
        rules += [Rule(name, name) for name in (f"experts.{first}", "experts.down_proj")]
    else:
        rules += _separate_experts_rules(separate_experts, expert_names, gated)
    if loss_free:
        rules.append(Rule("gate.e_score_correction_bias", "router.expert_bias"))
    if shared_expert is not None:
        named = NAMED if gated else NAMED[1:]
        rules += [Rule(f"{shared_expert}.{name}.weight", f"shared_expert.{name}.weight") for name in named]
    if shared_expert_gate:
        rules.append(Rule("shared_expert_gate.weight", "shared_expert_gate.weight"))
    return rules


def _separate_experts_rules(num_experts: int, names: tuple[str, str, str], gated: bool) -> list[Rule]:
    """[F, D] and [D, F] of each expert -> [E, 2F, D], or without gates [E, F, D], and [E, D, F]."""
    gate, up, down = ([f"experts.{expert}.{name}.weight" for expert in range(num_experts)] for name in names)
    gate_up = [name for pair in zip(gate, up, strict=True) for name in pair]
    stack = Flatten((num_experts, -1)).inverse
    # In this order (gate and up of each expert) one concatenation is enough, and the stack is a view of it.
    return [
        Rule(gate_up, "experts.gate_up_proj", Split(2 * num_experts).inverse, stack)
        if gated
        else Rule(up, "experts.up_proj", Split(num_experts).inverse, stack),
        Rule(down, "experts.down_proj", Split(num_experts).inverse, stack),
    ]
