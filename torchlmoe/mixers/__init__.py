"""Sequence mixers by name. To add one: write its file, and add a row here and in the tests."""

from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.base import Mixer
from torchlmoe.mixers.based import Based
from torchlmoe.mixers.bla import BasicLinearAttention
from torchlmoe.mixers.deltanet import DeltaNet
from torchlmoe.mixers.gated_deltanet import GatedDeltaNet
from torchlmoe.mixers.gateloop import GateLoop
from torchlmoe.mixers.gfw import GatedFastWeights
from torchlmoe.mixers.gla import GatedLinearAttention
from torchlmoe.mixers.gsa import GatedSlotAttention
from torchlmoe.mixers.hgrn2 import HGRN2
from torchlmoe.mixers.kda import KimiDeltaAttention
from torchlmoe.mixers.lightning import LightningAttention
from torchlmoe.mixers.mamba import Mamba
from torchlmoe.mixers.mamba2 import Mamba2
from torchlmoe.mixers.mom import MixtureOfMemories
from torchlmoe.mixers.rebased import ReBased
from torchlmoe.mixers.retention import Retention
from torchlmoe.mixers.rwkv6 import RWKV6
from torchlmoe.mixers.rwkv7 import RWKV7
from torchlmoe.mixers.s4 import S4
from torchlmoe.mixers.titans import Titans
from torchlmoe.mixers.ttt import TTT
from torchlmoe.registry import Registry

MIXERS: Registry[type[Mixer]] = Registry(
    "Mixer",
    {
        "bla": BasicLinearAttention,
        "lightning": LightningAttention,
        "retention": Retention,
        "gla": GatedLinearAttention,
        "hgrn2": HGRN2,
        "s4": S4,
        "mamba": Mamba,
        "mamba2": Mamba2,
        "rwkv6": RWKV6,
        "rwkv7": RWKV7,
        "gateloop": GateLoop,
        "gfw": GatedFastWeights,
        "based": Based,
        "rebased": ReBased,
        "deltanet": DeltaNet,
        "gated_deltanet": GatedDeltaNet,
        "kda": KimiDeltaAttention,
        "gsa": GatedSlotAttention,
        "mom": MixtureOfMemories,
        "ttt": TTT,
        "titans": Titans,
        "attention": Attention,
    },
)

__all__ = ["MIXERS", "Mixer"]
