"""RWKV-7 in flash-linear-attention: RWKV7ForCausalLM."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.interop import fla
from torchlmoe.interop.family import Family, Names, all_mixers_of, blocks_of, feed_forward_of, model_tables, norm_rules
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.rules import Rule, prefixed
from torchlmoe.interop.steps import Flatten
from torchlmoe.mixers.rwkv7 import RWKV7
from torchlmoe.model.decoder import Decoder


def read(keys: Keys) -> dict[str, Any]:
    keys.only("hidden_act", "sqrelu")
    keys.only("attn", [])  # their block cannot take the outputs of their softmax attention
    keys.skip(*fla.WITHOUT_EFFECT, "use_l2warp")
    dim, num_layers, head_dim = keys.integer("hidden_size"), keys.integer("num_hidden_layers"), _read_head_dim(keys)
    keys.only("value_dim", dim, [dim] * num_layers)
    mlp_dim = -(int(dim * keys.number("hidden_ratio", 4.0)) // -32) * 32  # up to a multiple of 32
    norm_eps = keys.number("norm_eps", 1e-5)
    layer = {
        "mixer": "rwkv7",
        "num_heads": dim // head_dim,
        "decay_rank": _read_rank(keys, "decay_low_rank_dim", 64, 2.5 * head_dim / 64),
        "rate_rank": _read_rank(keys, "a_low_rank_dim", 64, 2.5 * head_dim / 64),
        "value_rank": _read_rank(keys, "v_low_rank_dim", 16, 1.7 * head_dim / 64),
        "gate_rank": _read_rank(keys, "gate_low_rank_dim", 128, 5.0),
        "head_norm_eps": norm_eps,
        "mlp": "dense",
        "mlp_token_shift": True,
        "mlp_options": {"mlp_dim": keys.integer("intermediate_size", mlp_dim), "activation": "relu2"},
    }
    return model_tables(
        {"L": layer},
        ["L"] * num_layers,
        dim=dim,
        norm="layer",
        norm_bias=keys.flag("norm_bias", True),
        norm_eps=norm_eps,
        embedding_norm=keys.flag("norm_first", True),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
    )


def _read_head_dim(keys: Keys) -> int:
    """Width of a head: 64 if the key is absent. Their layers read num_heads only if head_dim is null."""
    dim = keys.integer("hidden_size")
    keys.skip("num_heads")
    by_number = "head_dim" in keys.content and keys.content["head_dim"] is None
    key = "num_heads" if by_number else "head_dim"
    given = keys.integer(key) if by_number else keys.integer(key, 64)
    if dim % given:
        raise ValueError(f"{keys.place} has {key} = {given}, which must divide hidden_size = {dim}.")
    return dim // given if by_number else given


def _read_rank(keys: Keys, name: str, default: int, factor: float) -> int:
    """default: if the key is absent. If it is null, the rank grows with the width."""
    if name in keys.content and keys.content[name] is None:
        default = max(32, 32 * round(factor * keys.integer("hidden_size") ** 0.5 / 32))
    return keys.integer(name, default)


def write(model: Decoder) -> dict[str, Any]:
    (mixer,) = all_mixers_of(model, "rwkv7", "rwkv7")
    spec, blocks = model.spec, blocks_of(model)
    if mixer.shared_width != spec.dim:
        raise ValueError(
            f"A mixer is {mixer.shared_width} channels wide, which rwkv7 needs to be dim = {spec.dim}: choose another "
            "--format."
        )
    mixers = [block.mixer for block in blocks if isinstance(block.mixer, RWKV7)]
    of_values = [mixer.first_value_proj for mixer in mixers if mixer.first_value_proj is not None]
    return {
        "hidden_size": spec.dim,
        "num_hidden_layers": len(blocks),
        "intermediate_size": feed_forward_of(model, Dense, "rwkv7").units,
        "head_dim": mixer.value_dim,
        "num_heads": mixer.num_heads,
        "value_dim": [spec.dim] * len(blocks),
        "decay_low_rank_dim": mixer.decay_proj.down_proj.out_features,
        "a_low_rank_dim": mixer.rate_proj.down_proj.out_features,
        "gate_low_rank_dim": mixer.gate_proj.down_proj.out_features,
        **({"v_low_rank_dim": of_values[0].down_proj.out_features} if of_values else {}),
        "norm_first": spec.embedding_norm,
        "norm_bias": spec.norm_bias,
        "norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "hidden_act": "sqrelu",
        "attn": None,
    }


def rwkv7_rules(mixer: RWKV7) -> list[Rule]:
    """RWKV7Attention <-> `rwkv7`."""
    low_rank = {"w": "decay", "a": "rate", "g": "gate"}
    biases = {"w": "decay.bias", "a": "rate_bias"}
    if mixer.first_value_proj is not None:
        low_rank["v"], biases["v"] = "first_value", "first_value_bias"
    flat = Flatten((1, 1, mixer.q_proj.in_features))
    return [
        *(Rule(f"x_{name}", f"mix.{name}.weight", flat) for name in mixer.mix),
        Rule("k_k", "erase_scale"),
        Rule("k_a", "rate_share"),
        Rule("r_k", "bonus", Flatten((mixer.num_heads, mixer.key_dim))),
        Rule("r_proj.weight", "q_proj.weight"),
        *(Rule(f"{name}_proj.weight", f"{name}_proj.weight") for name in "kvo"),
        *(Rule(f"{name}_lora.lora.0.weight", f"{ours}_proj.down_proj.weight") for name, ours in low_rank.items()),
        *(Rule(f"{name}_lora.lora.2.weight", f"{ours}_proj.up_proj.weight") for name, ours in low_rank.items()),
        *(Rule(f"{name}_lora.lora.2.bias", ours) for name, ours in biases.items()),
        *norm_rules(mixer.norm, "g_norm", "norm"),
    ]


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return [
        *norm_rules(block.mixer_norm, "attn_norm", "mixer_norm"),
        *prefixed(rwkv7_rules(block.mixer), "attn.", "mixer."),
        *norm_rules(block.feed_forward_norm, "ffn_norm", "feed_forward_norm"),
        Rule("ffn.x_k", "feed_forward_shift.mix.weight"),
        Rule("ffn.key.weight", "feed_forward.up_proj.weight"),
        Rule("ffn.value.weight", "feed_forward.down_proj.weight"),
    ]


NAMES = Names(embedding="model.embeddings.weight", embedding_norm="model.layers.0.pre_norm")
FAMILY = Family("rwkv7", "RWKV7ForCausalLM", read, write, block_rules, NAMES)
