"""The mixer of Mamba in transformers."""

from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Flatten, Split


def mamba_rules(*, channels: int, state_dim: int, conv_size: int) -> list[Rule]:
    """MambaMixer <-> `mamba`."""
    return [
        Rule("in_proj.weight", ["x_proj.weight", "gate_proj.weight"], Split((channels, channels))),
        Rule("conv1d.weight", "x_conv.weight", Flatten((1, conv_size), dim=1)),
        Rule("conv1d.bias", "x_conv.bias"),
        Rule("x_proj.weight", "step_B_C_proj.weight"),
        Rule("dt_proj.weight", "step_proj.weight"),
        Rule("dt_proj.bias", "decay.dt_bias"),
        Rule("A_log", "decay.A_log", Flatten((channels, state_dim))),
        Rule("D", "D"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]
