"""`layer_types` of hybrids in config.json: one word for the mixer of each layer."""

from __future__ import annotations

from typing import Any

from torchlmoe.interop.family import blocks_of
from torchlmoe.mixers.attention import Attention
from torchlmoe.model.decoder import Decoder

LAYERS = {"linear_attention": "L", "full_attention": "N"}
DENSE = {"L": "D", "N": "E"}  # the letters of layers with the same mixers and dense MLPs


def write_layer_types(model: Decoder) -> dict[str, Any]:
    """Return the key `layer_types` of a model."""
    kinds = [isinstance(block.mixer, Attention) for block in blocks_of(model)]
    return {"layer_types": ["full_attention" if is_attention else "linear_attention" for is_attention in kinds]}
