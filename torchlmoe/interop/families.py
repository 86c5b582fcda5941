"""The families that can be imported and exported, by transformers' `model_type`."""

from torchlmoe.interop import (
    bamba,
    granitemoehybrid,
    llama,
    mamba,
    mamba2,
    mixtral,
    nemotron_h,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
)
from torchlmoe.interop.family import Family

_MODULES = (
    bamba, granitemoehybrid, llama, mamba, mamba2, mixtral, nemotron_h, olmoe, qwen2_moe, qwen3, qwen3_moe, qwen3_next,
)  # fmt: skip
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
