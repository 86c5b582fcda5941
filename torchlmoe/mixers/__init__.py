"""Sequence mixers by the name that the settings use. To add one: write its file, add its row here and in the tests."""

from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.base import Mixer
from torchlmoe.mixers.based import Based
from torchlmoe.mixers.bla import BasicLinearAttention
from torchlmoe.mixers.deltanet import DeltaNet
from torchlmoe.mixers.gated_deltanet import GatedDeltaNet
from torchlmoe.mixers.gateloop import GateLoop
from torchlmoe.mixers.gla import GatedLinearAttention
from torchlmoe.mixers.kda import KimiDeltaAttention
from torchlmoe.mixers.lightning import LightningAttention
from torchlmoe.mixers.mamba2 import Mamba2
from torchlmoe.mixers.rebased import ReBased
from torchlmoe.mixers.retention import Retention

MIXERS: dict[str, type[Mixer]] = {
    "bla": BasicLinearAttention,
    "lightning": LightningAttention,
    "retention": Retention,
    "gla": GatedLinearAttention,
    "mamba2": Mamba2,
    "gateloop": GateLoop,
    "based": Based,
    "rebased": ReBased,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "attention": Attention,
}

__all__ = ["MIXERS", "Mixer"]
