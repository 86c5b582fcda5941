"""MiniMax-Text-01 in transformers: MiniMaxForCausalLM. Lightning attention, with attention and experts of Mixtral."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlmoe.interop.family import Family, all_mixers_of, blocks_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.layer_types import LAYERS, write_layer_types
from torchlmoe.interop.mixtral import layer_of_experts_rules, read_experts, write_experts
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.softmax import attention_rules, read_attention, read_model, write_attention, write_model
from torchlmoe.interop.steps import Split
from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.lightning import LightningAttention
from torchlmoe.model.decoder import Decoder

logger = logging.getLogger(__name__)
# Buffers of a lightning layer in transformers, which its settings determine.
CONSTANTS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
BLOCK = 256  # tokens in a chunk there, the size of the last three buffers


def read(keys: Keys) -> dict[str, Any]:
    keys.only("postnorm", True)
    keys.skip("block_size")  # size of a chunk, which changes no result
    num_layers = keys.integer("num_hidden_layers")
    default = ["linear_attention" if index % 2 else "full_attention" for index in range(num_layers)]
    letters = keys.choices("layer_types", num_layers, LAYERS, default)
    experts = {"mlp": "moe", "mlp_options": read_experts(keys)}
    # transformers ignores rotary_dim. In the authors' code it is the number of channels of a head that are rotated.
    attention = read_attention(keys, base=1e6, sliding_window=keys.integer("sliding_window", None))
    rotary_dim = keys.integer("rotary_dim", attention["head_dim"])
    attention["rotary_fraction"] = rotary_dim / attention["head_dim"]
    lightning = {
        "mixer": "lightning",
        "num_heads": attention["num_heads"],
        "head_dim": attention["head_dim"],
        "norm_eps": 1e-6,  # fixed in transformers; rms_norm_eps does not apply to this norm
    }
    kinds = {
        "L": {**lightning, **_read_residual(keys, "linear"), **experts},
        "N": {**attention, **_read_residual(keys, "full"), **experts},
    }
    return model_tables(kinds, letters, **read_model(keys, norm_eps=1e-5))


def _read_residual(keys: Keys, kind: str) -> dict[str, Any]:
    """Return the weights of a layer's branches and of the residual stream. kind: "linear" or "full", as in the keys."""
    return {
        "norm_placement": "stream",
        "mixer_stream_weight": keys.number(f"{kind}_attn_alpha_factor", 1.0),
        "mixer_branch_weight": keys.number(f"{kind}_attn_beta_factor", 1.0),
        "mlp_stream_weight": keys.number("mlp_alpha_factor", 1.0),
        "mlp_branch_weight": keys.number("mlp_beta_factor", 1.0),
    }


def write(model: Decoder) -> dict[str, Any]:
    _, attention = all_mixers_of(model, "minimax", "lightning", "attention")
    blocks, rotary_dim = blocks_of(model), attention.rotary_dim
    if rotary_dim != attention.head_dim:
        logger.warning(
            f"config.json has rotary_dim = {rotary_dim}, which transformers ignores: there, all "
            f"{attention.head_dim} channels of a head would be rotated."
        )
    factors: dict[str, float] = {}
    for block in blocks:
        kind = "full" if isinstance(block.mixer, Attention) else "linear"
        factors |= {
            f"{kind}_attn_alpha_factor": block.residual.mixer_stream_weight,
            f"{kind}_attn_beta_factor": block.residual.mixer_branch_weight,
            "mlp_alpha_factor": block.residual.mlp_stream_weight,
            "mlp_beta_factor": block.residual.mlp_branch_weight,
        }
    return {
        **write_model(model),
        **write_attention(attention),
        "rotary_dim": rotary_dim,
        "sliding_window": attention.sliding_window,
        **write_layer_types(model),
        **write_experts(model, "minimax"),
        **factors,
        "block_size": BLOCK,
    }


def lightning_rules(*, num_heads: int, head_dim: int) -> list[Rule]:
    """Return the rules between MiniMaxLightningAttention and `lightning`.

    Their qkv_proj has, for each head, the rows of q, k and v.
    """
    return [
        Rule(
            "qkv_proj.weight",
            ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
            Split((head_dim,) * 3, groups=num_heads),
        ),
        Rule("output_gate.weight", "gate_proj.weight"),
        Rule("norm.weight", "norm.weight"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    mixer = block.mixer
    if isinstance(mixer, LightningAttention):
        table = lightning_rules(num_heads=mixer.num_heads, head_dim=mixer.key_dim)
    else:
        table = attention_rules(mixer)
    return layer_of_experts_rules(table, block.feed_forward, separate_experts)


def constants(model: Decoder) -> dict[str, Callable[[], Tensor]]:
    """Return functions that make the `CONSTANTS` of every lightning layer, by their names in files."""
    return {
        f"model.layers.{index}.self_attn.{name}": partial(_constant, name, block.mixer.num_heads, block.mixer.factor)
        for index, block in model.blocks.items()
        if isinstance(block.mixer, LightningAttention)
        for name in CONSTANTS
    }


def _constant(name: str, num_heads: int, factor: float) -> Tensor:
    """Return a buffer in float64. factor: multiplies the decays of the layer."""
    exponent = torch.arange(num_heads, dtype=torch.float64) + 1
    slope = ((1 / 2 ** (8 / num_heads)) ** exponent * factor)[:, None, None]
    place = torch.arange(BLOCK, dtype=torch.float64)[:, None] + 1
    if name == "slope_rate":
        return slope
    if name == "query_decay":
        return torch.exp(-slope * place)
    if name == "key_decay":
        return torch.exp(-slope * (BLOCK - place))
    distance = place - place.T
    return torch.exp(torch.where(distance >= 0, -slope * distance, -torch.inf))[None]


FAMILY = Family("minimax", "MiniMaxForCausalLM", read, write, block_rules, constants=constants)
