"""The families that can be imported and exported, by transformers' `model_type`."""

from torchlmoe.interop import (
    deepseek_v2,
    deepseek_v3,
    kimi_linear,
    llama,
    minimax,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
)
from torchlmoe.interop.family import Family

_MODULES = (
    deepseek_v2, deepseek_v3, kimi_linear, llama, minimax, mixtral, olmoe, qwen2_moe, qwen3, qwen3_moe, qwen3_next,
)  # fmt: skip
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
