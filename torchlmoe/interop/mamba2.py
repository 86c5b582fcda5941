"""The mixer of Mamba2 in transformers."""

from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Flatten, Split


def mamba2_rules(*, num_heads: int, head_dim: int, state_dim: int, num_groups: int, conv_size: int) -> list[Rule]:
    """Mamba2Mixer <-> `mamba2`. head_dim: width of a value head."""
    value_width, key_width = num_heads * head_dim, num_groups * state_dim
    convolved = (value_width, key_width, key_width)  # in theirs: x, B, C
    return [
        Rule(
            "in_proj.weight",
            ["gate_proj.weight", "v_proj.weight", "k_proj.weight", "q_proj.weight", "dt_proj.weight"],
            Split((value_width, *convolved, num_heads)),
        ),
        Rule(
            "conv1d.weight",
            ["v_conv.weight", "k_conv.weight", "q_conv.weight"],
            Flatten((1, conv_size), dim=1),
            Split(convolved),
        ),
        Rule("conv1d.bias", ["v_conv.bias", "k_conv.bias", "q_conv.bias"], Split(convolved)),
        Rule("A_log", "decay.A_log"),
        Rule("dt_bias", "decay.dt_bias"),
        Rule("D", "D"),
        Rule("norm.weight", "norm.weight"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]
