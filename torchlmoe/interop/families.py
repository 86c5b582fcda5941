"""The families that can be imported and exported, by transformers' `model_type`."""

from importlib import import_module
from typing import Any

from torchlmoe.interop.family import Family

# Each has a file of its name.
_MODEL_TYPES = """
    bamba deepseek_v2 deepseek_v3 gated_deltanet gla granitemoehybrid kimi_linear llama mamba mamba2
    minimax mixtral nemotron_h olmo_hybrid olmoe qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
    qwen3_moe qwen3_next rwkv7
""".split()
FAMILIES: dict[str, Family] = {name: import_module(f"torchlmoe.interop.{name}").FAMILY for name in _MODEL_TYPES}
# Models of text and images, whose text_config is that of a family. Their language model alone is imported.
MULTIMODAL = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
_OF_IMAGES = frozenset(
    "text_config vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id".split()
)


def language_config(content: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that describe the language model: of a multimodal one, its text_config.

    What is said outside of it, such as whether embeddings are tied, holds. Raises ValueError for a multimodal one
    without text_config.
    """
    kind = content.get("model_type")
    if kind not in MULTIMODAL:
        return content
    inner = content.get("text_config")
    if not isinstance(inner, dict):
        raise ValueError(f"A config.json with model_type = {kind!r} must have an object text_config; it has {inner!r}.")
    outer = {name: value for name, value in content.items() if name not in _OF_IMAGES and value is not None}
    return {**inner, **outer, "model_type": MULTIMODAL[kind]}
