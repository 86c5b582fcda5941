"""Sequence mixers by the name that the settings use. To add one: write its file, add its row here and in the tests."""

from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.base import Mixer
from torchlmoe.mixers.bla import BasicLinearAttention
from torchlmoe.mixers.gated_deltanet import GatedDeltaNet
from torchlmoe.mixers.gla import GatedLinearAttention
from torchlmoe.mixers.mamba import Mamba
from torchlmoe.mixers.s4 import S4

MIXERS: dict[str, type[Mixer]] = {
    "bla": BasicLinearAttention,
    "gla": GatedLinearAttention,
    "gated_deltanet": GatedDeltaNet,
    "mamba": Mamba,
    "s4": S4,
    "attention": Attention,
}

__all__ = ["MIXERS", "Mixer"]
