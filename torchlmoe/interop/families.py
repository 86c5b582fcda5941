"""The families that can be imported and exported, by transformers' `model_type`."""

from torchlmoe.interop import (
    bamba,
    deepseek_v2,
    deepseek_v3,
    granitemoehybrid,
    kimi_linear,
    llama,
    mamba,
    mamba2,
    minimax,
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
    bamba, deepseek_v2, deepseek_v3, granitemoehybrid, kimi_linear, llama,
    mamba, mamba2, minimax, mixtral, nemotron_h,
    olmoe, qwen2_moe, qwen3, qwen3_moe, qwen3_next,
)  # fmt: skip
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
