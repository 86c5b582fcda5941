"""What models of flash-linear-attention have around their mixers: blocks, MLPs and, in some layers, attention."""

from __future__ import annotations

import string
from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.interop.family import Names, blocks_of, feed_forward_of, mixers_of, model_tables, required
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.rules import Rule, prefixed
from torchlmoe.interop.softmax import attention_rules, mlp_rules
from torchlmoe.mixers.attention import Attention
from torchlmoe.model.decoder import Decoder

NAMES = Names(embedding="model.embeddings.weight")
ATTENTION_LETTERS = ["N", *(letter for letter in string.ascii_letters if letter not in "LN")]
WITHOUT_EFFECT = ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy")


def read_model(keys: Keys, mixer: dict[str, Any]) -> dict[str, Any]:
    """Tables of settings. mixer: that of layers without softmax attention, and its options."""
    keys.only("hidden_act", "swish")
    keys.only("attnres_block_size")
    keys.skip(*WITHOUT_EFFECT, "use_l2warp")
    dim, ratio = keys.integer("hidden_size"), keys.number("hidden_ratio", 4.0)
    mlp_dim = keys.integer("intermediate_size", -(int(dim * ratio * 2 / 3) // -256) * 256)  # up to a multiple of 256
    letters = ["L"] * keys.integer("num_hidden_layers")
    mixers = {"L": mixer, **_read_attention(keys, letters)}
    mlp = {"mlp": "dense", "mlp_options": {"mlp_dim": mlp_dim}}
    return model_tables(
        {letter: {**each, **mlp} for letter, each in mixers.items()},
        letters,
        dim=dim,
        norm_eps=keys.number("norm_eps", 1e-6),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
    )


def _read_attention(keys: Keys, letters: list[str]) -> dict[str, dict[str, Any]]:
    """The mixers of layers with softmax attention; their letters are put into the list."""
    given, mixers = keys.take("attn", [], (dict, list)), {}
    specs = [given] if isinstance(given, dict) else given
    for letter, spec in zip(ATTENTION_LETTERS, specs, strict=False):
        if not isinstance(spec, dict):
            raise ValueError(f"{keys.place} has {spec!r} in its attn, which must be an object or a list of them.")
        inner = Keys(spec, f"The attn of {keys.place}")
        for layer in inner.take("layers", kind=list):
            if layer not in range(len(letters)):
                raise ValueError(f"{inner.place} has layers = {layer}, which must be from 0 to {len(letters) - 1}.")
            if letters[layer] != "L":
                raise ValueError(f"{inner.place} has layer {layer} twice.")
            letters[layer] = letter
        heads = inner.integer("num_heads")
        mixers[letter] = {
            "mixer": "attention",
            "num_heads": heads,
            "num_kv_heads": inner.integer("num_kv_heads", heads),
            "qkv_bias": inner.flag("qkv_bias", False),
            "sliding_window": inner.integer("window_size", None),
            "rope_base": inner.number("rope_theta", 10_000.0),
        }
        inner.finish()
    return mixers


def write_model(model: Decoder, model_type: str) -> tuple[Any, dict[str, Any]]:
    """The first mixer of that name, and the inverse of `read_model`."""
    mixer, _ = mixers_of(model, model_type, model_type, "attention")
    return required(mixer, model_type, model_type), {
        "hidden_size": model.spec.dim,
        "num_hidden_layers": len(model.blocks),
        "intermediate_size": feed_forward_of(model, Dense, model_type).units,
        "norm_eps": model.spec.norm_eps,
        "tie_word_embeddings": model.spec.tie_embeddings,
        "hidden_act": "swish",
        "attn": _write_attention(model),
    }


def _write_attention(model: Decoder) -> dict[str, Any] | list[dict[str, Any]] | None:
    specs: list[dict[str, Any]] = []
    for index, block in enumerate(blocks_of(model)):
        if not isinstance(block.mixer, Attention):
            continue
        spec = {
            "num_heads": block.mixer.num_heads,
            "num_kv_heads": block.mixer.num_kv_heads,
            "qkv_bias": block.mixer.q_proj.bias is not None,
            "window_size": block.mixer.sliding_window,
            "rope_theta": block.mixer.rope_base,
        }
        same = [each for each in specs if spec.items() <= each.items()]
        if same:
            same[0]["layers"].append(index)
        else:
            specs.append({"layers": [index], **spec})
    return specs if len(specs) > 1 else specs[0] if specs else None


def layer_rules(block: Any, mixer: list[Rule]) -> list[Rule]:
    """A layer's weights. mixer: those of its mixer, unless it is softmax attention."""
    table = attention_rules(block.mixer) if isinstance(block.mixer, Attention) else mixer
    return [
        Rule("attn_norm.weight", "mixer_norm.weight"),
        *prefixed(table, "attn.", "mixer."),
        Rule("mlp_norm.weight", "feed_forward_norm.weight"),
        *prefixed(mlp_rules(block.feed_forward), "mlp.", "feed_forward."),
    ]
