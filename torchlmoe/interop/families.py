"""The families that can be imported and exported, by transformers' `model_type`."""

from importlib import import_module
from typing import Any

from torchlmoe.interop.family import Family

# Each has a file with its name.
_MODEL_TYPES = """
    bamba deepseek_v2 deepseek_v3 gated_deltanet gla granitemoehybrid kimi_linear llama mamba mamba2
    minimax mixtral nemotron_h olmo_hybrid olmoe qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
    qwen3_moe qwen3_next rwkv7
""".split()
FAMILIES: dict[str, Family] = {name: import_module(f"torchlmoe.interop.{name}").FAMILY for name in _MODEL_TYPES}
# Models of text and images -> the family of their text_config. Only their language model is imported.
MULTIMODAL = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
_OF_IMAGES = frozenset(
    "text_config vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id".split()
)


def language_config(content: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json that describe the language model. For a multimodal model this is text_config.

    Keys beside text_config, such as tie_word_embeddings, override its keys. Raises ValueError for a multimodal model
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
