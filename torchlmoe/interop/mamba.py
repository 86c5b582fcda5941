"""Mamba in transformers: MambaForCausalLM. A layer has a norm and a mixer, and no feed-forward layer."""

from __future__ import annotations

from typing import Any

from torchlmoe.interop.family import Family, Names, mixers_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.rules import Rule, prefixed
from torchlmoe.interop.steps import Flatten, Split
from torchlmoe.mixers.mamba import Mamba
from torchlmoe.model.decoder import Decoder

NAMES = Names("backbone.embeddings.weight", "backbone.layers", "backbone.norm_f")


def read_model(keys: Keys, *, tied: bool) -> dict[str, Any]:
    """Return settings of `[model]`. tied: default of tie_word_embeddings."""
    keys.only("hidden_act", "silu")
    keys.skip("residual_in_fp32", "time_step_max", "time_step_min", "time_step_floor")
    return {
        "dim": keys.integer("hidden_size"),
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings", tied),
    }


def write_model(model: Decoder) -> dict[str, Any]:
    """The inverse of `read_model`."""
    return {
        "hidden_size": model.spec.dim,
        "num_hidden_layers": len(model.blocks),
        "layer_norm_epsilon": model.spec.norm_eps,
        "tie_word_embeddings": model.spec.tie_embeddings,
    }


def whole_multiple(width: int, dim: int, model_type: str) -> int:
    """Return width / dim. Raises ValueError if it is not a whole number, as config.json needs."""
    if width % dim:
        raise ValueError(
            f"A mixer is {width} channels wide, which {model_type} needs to be a multiple of dim = {dim}: choose "
            "another --format."
        )
    return width // dim


def read(keys: Keys) -> dict[str, Any]:
    rank = keys.take("time_step_rank", "auto", (int, str))
    layer = {
        "mixer": "mamba",
        "mlp": "none",
        "expand": float(keys.integer("expand")),
        "state_dim": keys.integer("state_size"),
        "step_rank": None if rank == "auto" else rank,
        "conv_size": keys.integer("conv_kernel"),
        "conv_bias": keys.flag("use_conv_bias", True),
        "proj_bias": keys.flag("use_bias", False),
    }
    keys.skip("intermediate_size", "time_step_init_scheme", "time_step_scale", "use_associative_scan", "use_mambapy")
    # Files converted from the original checkpoints repeat sizes under these names.
    keys.skip("d_inner", "d_model", "n_layer", "ssm_cfg", "fused_add_norm", "rms_norm", "pad_vocab_size_multiple")
    return model_tables({"L": layer}, "L" * keys.integer("num_hidden_layers"), **read_model(keys, tied=True))


def write(model: Decoder) -> dict[str, Any]:
    (mixer,) = mixers_of(model, "mamba", "mamba")
    if mixer is None:
        raise ValueError("The model has no mixer: choose another --format.")
    return {
        **write_model(model),
        "expand": whole_multiple(mixer.channels, model.spec.dim, "mamba"),
        "state_size": mixer.state_dim,
        "time_step_rank": mixer.step_rank,
        "conv_kernel": mixer.x_conv.weight.shape[-1],
        "use_conv_bias": mixer.x_conv.bias is not None,
        "use_bias": mixer.x_proj.bias is not None,
    }


def mamba_rules(
    *, channels: int, state_dim: int, conv_size: int, conv_bias: bool = True, proj_bias: bool = False
) -> list[Rule]:
    """Return the rules between MambaMixer and `mamba`."""
    rules = [
        Rule("in_proj.weight", ["x_proj.weight", "gate_proj.weight"], Split((channels, channels))),
        Rule("conv1d.weight", "x_conv.weight", Flatten((1, conv_size), dim=1)),
        Rule("x_proj.weight", "step_B_C_proj.weight"),
        Rule("dt_proj.weight", "step_proj.weight"),
        Rule("dt_proj.bias", "decay.dt_bias"),
        Rule("A_log", "decay.A_log", Flatten((channels, state_dim))),
        Rule("D", "D"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]
    if conv_bias:
        rules.append(Rule("conv1d.bias", "x_conv.bias"))
    if proj_bias:
        rules.append(Rule("in_proj.bias", ["x_proj.bias", "gate_proj.bias"], Split((channels, channels))))
        rules.append(Rule("out_proj.bias", "o_proj.bias"))
    return rules


def layer_rules(mixer: list[Rule]) -> list[Rule]:
    """Return the rules for a layer with a norm and a mixer. mixer: rules of the mixer."""
    return [Rule("norm.weight", "mixer_norm.weight"), *prefixed(mixer, "mixer.", "mixer.")]


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    mixer = block.mixer
    assert isinstance(mixer, Mamba)
    return layer_rules(
        mamba_rules(
            channels=mixer.channels,
            state_dim=mixer.state_dim,
            conv_size=mixer.x_conv.weight.shape[-1],
            conv_bias=mixer.x_conv.bias is not None,
            proj_bias=mixer.x_proj.bias is not None,
        )
    )


FAMILY = Family("mamba", "MambaForCausalLM", read, write, block_rules, NAMES)
