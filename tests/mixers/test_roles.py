"""What modules declare of heads (`head_dims`): a mixer cut along it computes its heads' part of the whole.

Each part holds half of every parameter along the declared dimension, and what heads share as a whole. The parts'
outputs add up to the whole mixer's, unless the mixer itself sums over heads or channels.
"""

import copy

import pytest
import torch

from tests.mixers.test_every_mixer import CASES, MIXTURES, PACKED, build, inputs
from torchlmoe.layers.linear import RowLinear
from torchlmoe.mixers.base import Mixer

PARTS = 2
# A norm over all heads, inputs of the state space from all channels, or a gate after the output projection.
SUMS_OVER_HEADS = (
    "lightning",
    "hgrn2",
    "gsa",
    "ttt",
    "mamba",
    "s4",
    "mom_lightning",
    "mom_hgrn2",
    "attention_norm_of_all_heads",
)
# One group of heads, which no part of them can have a part of.
ONE_GROUP = ("mamba2", "mom_mamba2_single")


def part_of(mixer, index):
    part = copy.deepcopy(mixer)
    for module in part.modules():
        if isinstance(module, Mixer):
            module.part_of_heads = (index, PARTS)
        for name, parameter in module.named_parameters(recurse=False):
            if name in module.head_dims:
                own = parameter.detach().chunk(PARTS, module.head_dims[name])[index]
                setattr(module, name, torch.nn.Parameter(own.clone()))
            elif isinstance(module, RowLinear) and name == "bias":  # which the sum has once
                module.bias = torch.nn.Parameter(parameter.detach() / PARTS)
    return part


@pytest.mark.parametrize("case", CASES | MIXTURES)
def test_every_parameter_has_a_role(case):
    for name, module in build(case).named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            assert isinstance(getattr(module, "head_dims", None), dict), f"{name} of {case} has no head_dims"
            for parameter, dim in module.head_dims.items():
                assert parameter not in own or -1 <= dim < own[parameter].dim()


@pytest.mark.parametrize("case", [case for case in CASES | MIXTURES if case not in ONE_GROUP])
@torch.no_grad()
def test_parts_add_up(case):
    mixer, x = build(case), inputs(1, 40)
    common = mixer.common(1)
    handed = {} if common is None else {"common": torch.rand(common()[0].shape, dtype=torch.float64)}
    parts = []
    for index in range(PARTS):
        parts.append(part_of(mixer, index)(x, sequence=PACKED, **handed))
    whole = mixer(x, sequence=PACKED, **handed)
    if any(case == name or case.startswith(f"{name}_") for name in SUMS_OVER_HEADS):
        assert (sum(parts) - whole).norm() > 1e-3 * whole.norm()
    else:
        torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_comparison_sees_mistakes():
    """Heads split by count, and a constant taken from the local number of a head."""
    mixer, x = build("retention"), inputs(1, 40)
    parts = [part_of(mixer, index) for index in range(PARTS)]
    whole = mixer(x, sequence=PACKED)
    parts[1].part_of_heads = (0, PARTS)
    assert (sum(part(x, sequence=PACKED) for part in parts) - whole).norm() > 1e-3 * whole.norm()
    mixer = build("gla")
    whole, parts = mixer(x, sequence=PACKED), [part_of(mixer, index) for index in range(PARTS)]
    for part in parts:
        part.head_widths = tuple(width // PARTS for width in part.head_widths)  # as if its width were cut in four heads
    with pytest.raises((RuntimeError, ValueError)):
        parts[0](x, sequence=PACKED)
