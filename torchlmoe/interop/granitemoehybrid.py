"""GraniteMoeHybrid in transformers: GraniteMoeHybridForCausalLM (Granite 4). Its mixers are those of Bamba."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop.bamba import mixer_rules, read_mixers, write_mixers
from torchlmoe.interop.family import Family, blocks_of, feed_forward_of, first_feed_forward, mixers_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.layer_types import LAYERS, write_layer_types
from torchlmoe.interop.moe import shared_units
from torchlmoe.interop.rules import Rule, prefixed
from torchlmoe.interop.softmax import layer_rules, read_model, write_model
from torchlmoe.interop.steps import Split
from torchlmoe.model.decoder import Decoder

OLDER_LAYERS = {"mamba": "L", "attention": "N"}  # words in files from before transformers 5


def read(keys: Keys) -> dict[str, Any]:
    num_layers = keys.integer("num_hidden_layers")
    letters = keys.choices("layer_types", num_layers, LAYERS | OLDER_LAYERS, ["linear_attention"] * num_layers)
    keys.only("position_embedding_type", "rope", "nope")
    no_positions = {} if keys.take("position_embedding_type", "nope") == "rope" else {"rotary_fraction": 0.0}
    mamba, attention = read_mixers(keys, softmax_scale=keys.number("attention_multiplier", 1.0), **no_positions)
    keys.only("normalization_function", "rmsnorm")
    keys.skip("init_method")
    branch = keys.number("residual_multiplier", 1.0)
    layer = {"mixer_branch_weight": branch, "mlp_branch_weight": branch, **_read_feed_forward(keys)}
    return model_tables(
        {"L": mamba | layer, "N": attention | layer},
        letters,
        embedding_multiplier=keys.number("embedding_multiplier", 1.0),
        logit_divisor=keys.number("logits_scaling", 1.0),
        **read_model(keys),
    )


def _read_feed_forward(keys: Keys) -> dict[str, Any]:
    keys.skip("intermediate_size", "num_experts_per_tok", "router_aux_loss_coef")
    shared = keys.integer("shared_intermediate_size")
    if not keys.integer("num_local_experts", least=0):
        return {"mlp": "dense", "mlp_options": {"mlp_dim": shared}}
    experts = {
        "num_experts": keys.integer("num_local_experts"),
        "top_k": keys.integer("num_experts_per_tok"),
        "expert_dim": keys.integer("intermediate_size"),
        "shared_expert_dim": shared,
        "aux_loss_weight": keys.number("router_aux_loss_coef", 0.0),
    }
    return {"mlp": "moe", "mlp_options": experts}


def write(model: Decoder) -> dict[str, Any]:
    _, attention = mixers_of(model, "granitemoehybrid", "mamba2", "attention")
    positions: dict[str, Any] = {"position_embedding_type": "nope"}
    if attention is not None:
        positions = {
            "position_embedding_type": "rope" if attention.rotary_dim else "nope",
            "attention_multiplier": attention.softmax_scale / attention.rope_scaling.softmax_factor,
        }
    return {
        **write_model(model),
        **write_mixers(model, "granitemoehybrid"),
        **positions,
        **_write_feed_forward(model),
        **write_layer_types(model),
        "residual_multiplier": blocks_of(model)[0].residual.mixer_branch_weight,
        "embedding_multiplier": model.spec.embedding_multiplier,
        "logits_scaling": model.spec.logit_divisor,
    }


def _write_feed_forward(model: Decoder) -> dict[str, Any]:
    experts = first_feed_forward(model, MoE)
    if experts is not None:
        return {
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "intermediate_size": experts.experts.down_proj.shape[-1],
            "shared_intermediate_size": shared_units(experts, "granitemoehybrid"),
            "router_aux_loss_coef": experts.load_balance.aux_loss_weight,
        }
    units = feed_forward_of(model, Dense, "granitemoehybrid").units
    return {"num_local_experts": 0, "shared_intermediate_size": units, "intermediate_size": units}


def feed_forward_rules(layer: Any, in_file: bool) -> list[Rule]:
    """Return the rules for a layer's MLP, and for its experts if it has some.

    in_file: whether names are those of files or of modules.
    """
    if not isinstance(layer, MoE):
        return _mlp_rules("")
    ours = ("router.weight", "experts.gate_up_proj", "experts.down_proj")
    theirs = ("router.layer.weight", "input_linear.weight", "output_linear.weight") if in_file else ours
    experts = [Rule(f"block_sparse_moe.{name}", our_name) for name, our_name in zip(theirs, ours, strict=True)]
    return [*experts, *_mlp_rules("shared_expert.")]


def _mlp_rules(prefix: str) -> list[Rule]:
    return [
        Rule("shared_mlp.input_linear.weight", [f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"], Split(2)),
        Rule("shared_mlp.output_linear.weight", f"{prefix}down_proj.weight"),
    ]


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    name, mixer = mixer_rules(block.mixer)
    feed_forward = feed_forward_rules(block.feed_forward, separate_experts)
    return [*layer_rules(mixer, [], mixer_name=name), *prefixed(feed_forward, "", "feed_forward.")]


FAMILY = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    read,
    write,
    block_rules,
    file_mark=".block_sparse_moe.input_linear.",
)
