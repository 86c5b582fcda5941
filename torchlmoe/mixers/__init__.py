"""Sequence mixers by the name that the settings use. To add one: write its file, add its row here and in the tests."""

from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.base import Mixer
from torchlmoe.mixers.bla import BasicLinearAttention
from torchlmoe.mixers.gated_deltanet import GatedDeltaNet
from torchlmoe.mixers.gla import GatedLinearAttention

MIXERS: dict[str, type[Mixer]] = {
    "bla": BasicLinearAttention,
    "gla": GatedLinearAttention,
    "gated_deltanet": GatedDeltaNet,
    "attention": Attention,
}

__all__ = ["MIXERS", "Mixer"]
