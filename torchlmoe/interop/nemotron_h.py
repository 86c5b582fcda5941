"""Nemotron-H and Nemotron 3 in transformers: NemotronHForCausalLM. A layer has a mixer or a feed-forward layer."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop import mamba2
from torchlmoe.interop.family import Family, Names, blocks_of, first_feed_forward, mixers_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.mamba import NAMES, layer_rules, read_model, write_model
from torchlmoe.interop.moe import moe_rules, shared_units
from torchlmoe.interop.rules import Rule, prefixed
from torchlmoe.interop.softmax import attention_rules, read_attention, write_attention
from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.mamba2 import Mamba2
from torchlmoe.model.decoder import Decoder

LETTERS = {"linear_attention": "M", "full_attention": "A", "moe": "E", "mlp": "D", "mamba": "M", "attention": "A"}
OF_PATTERN = {"M": "M", "*": "A", "E": "E", "-": "D"}
MAMBA2_KEYS = mamba2.KEYS | {
    "num_heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "state_dim": "ssm_state_size",
}
# Options of `moe` and their keys in config.json.
MOE_KEYS = {
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size",
    "latent_dim": "moe_latent_size",
    "shared_expert_dim": "moe_shared_expert_intermediate_size",
    "num_expert_groups": "n_group",
    "num_limited_groups": "topk_group",
    "normalize_top_k": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
}


def read(keys: Keys) -> dict[str, Any]:
    letters = _read_letters(keys)
    keys.only("mamba_hidden_act", "silu")
    mamba = {**mamba2.read_mamba2(keys, MAMBA2_KEYS), "min_step": keys.number("time_step_min", 1e-3)}
    attention = {**read_attention(keys), "rotary_fraction": 0.0}
    keys.only("attention_head_dim", attention["head_dim"])
    keys.only("sliding_window")
    keys.only("tie_word_embeddings", False)  # transformers ignores the key
    kinds: dict[str, dict[str, Any]] = {"M": mamba | {"mlp": "none"}, "A": attention | {"mlp": "none"}}
    keys.only("mlp_hidden_act", "relu2")
    keys.only("mlp_bias", False)
    if "D" in letters:
        width = keys.integer("intermediate_size")
        kinds["D"] = {"mixer": "none", "mlp": "dense", "mlp_options": {"mlp_dim": width, "activation": "relu2"}}
    if "E" in letters:
        kinds["E"] = {"mixer": "none", "mlp": "moe", "mlp_options": _read_experts(keys)}
    keys.skip("intermediate_size", *MOE_KEYS.values())
    # Keys that transformers does not read.
    keys.skip("time_step_limit", "attention_bias", "mamba_proj_bias", "n_shared_experts", "norm_eps", "rms_norm_eps")
    keys.skip(
        "chunk_size", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "num_logits_to_keep", "time_step_rank",
        "use_mamba_kernels", "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
    )  # fmt: skip
    return model_tables(kinds, letters, **read_model(keys, tied=False))


def _read_letters(keys: Keys) -> list[str]:
    """Return the letter of each layer. Files from before transformers 5 have a pattern in place of words."""
    pattern = keys.take("hybrid_override_pattern", "", str)
    words = keys.take("layers_block_type", [], list)
    keys.skip("num_hidden_layers")
    if words:
        return keys.choices("layers_block_type", len(words), LETTERS, [])
    if not pattern or set(pattern) - set(OF_PATTERN):
        raise ValueError(
            f"{keys.place} has hybrid_override_pattern = {pattern!r}, which must consist of {' '.join(OF_PATTERN)}."
        )
    return [OF_PATTERN[each] for each in pattern]


def _read_experts(keys: Keys) -> dict[str, Any]:
    numbers = ("num_experts", "top_k", "expert_dim", "shared_expert_dim")
    groups = keys.integer("n_group", 1)
    return {
        **{option: keys.integer(MOE_KEYS[option]) for option in numbers},
        "latent_dim": keys.integer("moe_latent_size", None),
        "num_expert_groups": groups,
        **({"group_score": "top2_sum"} if groups > 1 else {}),
        "num_limited_groups": keys.integer("topk_group", 1),
        "normalize_top_k": keys.flag("norm_topk_prob", True),
        "routed_scaling_factor": keys.number("routed_scaling_factor", 1.0),
        "activation": "relu2",
        "score_function": "sigmoid",
        "balance": "loss_free",
    }


def write(model: Decoder) -> dict[str, Any]:
    mamba, attention = mixers_of(model, "nemotron_h", "mamba2", "attention")
    experts, dense = first_feed_forward(model, MoE), first_feed_forward(model, Dense)
    heads: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1}
    if attention is not None:
        heads = write_attention(attention)
        heads["rope_theta"] = heads.pop("rope_parameters")["rope_theta"]  # has no effect, but files have the key
    return {
        **write_model(model),
        "layers_block_type": [_word(block) for block in blocks_of(model)],
        **mamba2.write_mamba2(mamba, model.spec.dim, MAMBA2_KEYS),
        **({} if mamba is None else {"time_step_min": (mamba.decay.step_limits or (0.0,))[0]}),
        **heads,
        **({} if experts is None else _write_experts(experts)),
        **({} if dense is None else {"intermediate_size": dense.units}),
    }


def _word(block: Any) -> str:
    if block.mixer is not None:
        return "full_attention" if isinstance(block.mixer, Attention) else "linear_attention"
    return "moe" if isinstance(block.feed_forward, MoE) else "mlp"


def _write_experts(layer: MoE) -> dict[str, Any]:
    """The inverse of `_read_experts`."""
    router = layer.router
    values = {
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "expert_dim": layer.experts.down_proj.shape[-1],
        "latent_dim": None if layer.to_latent is None else layer.to_latent.weight.shape[0],
        "shared_expert_dim": shared_units(layer, "nemotron_h"),
        "num_expert_groups": router.num_expert_groups,
        "num_limited_groups": router.num_limited_groups,
        "normalize_top_k": router.normalize_top_k,
        "routed_scaling_factor": router.routed_scaling_factor,
    }
    return {MOE_KEYS[option]: value for option, value in values.items()}


def feed_forward_rules(layer: Any, separate_experts: bool) -> list[Rule]:
    """Return the rules between NemotronHMoE and `MoE`, or NemotronHMLP and `Dense`, with activation "relu2"."""
    if isinstance(layer, Dense):
        return [Rule(f"{name}.weight", f"{name}.weight") for name in ("up_proj", "down_proj")]
    number = layer.num_experts if separate_experts else None
    rules = moe_rules(shared_expert="shared_experts", loss_free=True, separate_experts=number, gated=False)
    if layer.to_latent is not None:
        rules.append(Rule("fc1_latent_proj.weight", "to_latent.weight"))
        rules.append(Rule("fc2_latent_proj.weight", "from_latent.weight"))
    return rules


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    if block.mixer is None:
        feed_forward = feed_forward_rules(block.feed_forward, separate_experts)
        return [Rule("norm.weight", "feed_forward_norm.weight"), *prefixed(feed_forward, "mixer.", "feed_forward.")]
    mixer = block.mixer
    return layer_rules(mamba2.rules_of(mixer) if isinstance(mixer, Mamba2) else attention_rules(mixer))


FAMILY = Family(
    "nemotron_h",
    "NemotronHForCausalLM",
    read,
    write,
    block_rules,
    NAMES,
    left_out=("mtp.",),
    module_names=Names("model.embeddings.weight", "model.layers", "model.norm_f"),
    file_mark="backbone.",
)
