"""Keys of a config.json that change what a model computes and have no counterpart, and models without a place."""

import re

import pytest
from transformers import AutoConfig

from tests.interop.families import CASES
from torchlmoe.config.load import config_from, load_config
from torchlmoe.interop.families import FAMILIES
from torchlmoe.model.decoder import build_on_meta

REFUSED = [  # a case, keys of its config.json, and what the refusal names
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate = False"),
    ("qwen3_5_text", {"layer_types": ["sliding_attention"] * 4}, "'sliding_attention' among its layer_types"),
    ("qwen3_5_moe_text", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("qwen3_5_moe_text", {"mlp_only_layers": [1]}, "mlp_only_layers = [1]"),
    ("qwen3_5_moe_text", {"attention_bias": True}, "attention_bias = True"),
    ("olmo_hybrid", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("olmo_hybrid", {"linear_use_gate": True}, "linear_use_gate = True"),
]
# What files on the hub say beside that, and what changes nothing in text.
PASSED = [
    (
        "qwen3_5_moe_text",
        {
            "attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False, "full_attention_interval": 4, "mlp_only_layers": [],
        },
    ),
    ("olmo_hybrid", {"linear_a_log_max": 8.0, "linear_dt_init_floor": 1e-3}),
]  # fmt: skip


def content_of(name):
    model_type, options = CASES[name]
    return AutoConfig.for_model(model_type, **options).to_dict()


@pytest.mark.parametrize(("name", "keys", "named"), REFUSED)
def test_refused(name, keys, named):
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        FAMILIES[CASES[name][0]].settings({**content_of(name), **keys}, "config.json")
    message = str(caught.value)
    assert "without a counterpart" in message or "has no counterpart" in message
    assert message.startswith("config.json has ")


@pytest.mark.parametrize(("name", "keys"), PASSED)
def test_passed(name, keys):
    family, content = FAMILIES[CASES[name][0]], content_of(name)
    assert family.settings({**content, **keys}, "config.json") == family.settings(content, "config.json")


@pytest.mark.parametrize("theta_in", ["rope_parameters", "config"])
def test_no_positions(theta_in):
    """In OLMo-hybrid a rope_theta of null means none, and no rope_theta the default one."""
    content = content_of("olmo_hybrid")
    without = {**content, "rope_parameters": None}
    kinds = FAMILIES["olmo_hybrid"].settings(without, "config.json")["model"]["layers"]
    assert (kinds["N"]["rotary_fraction"], kinds["N"]["rope_base"]) == (1.0, 10_000.0)
    null = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
    content |= null if theta_in == "rope_parameters" else {"rope_parameters": None, "rope_theta": None}
    kinds = FAMILIES["olmo_hybrid"].settings(content, "config.json")["model"]["layers"]
    assert kinds["N"]["rotary_fraction"] == 0.0


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"])
def test_without_attention(model_type):
    """Sizes of attention must stand in config.json, and such a model has none."""
    tables = FAMILIES[model_type].settings(content_of(model_type), "config.json")
    tables["model"]["layer_pattern"] = "L"
    del tables["model"]["layers"]["N"]
    model = build_on_meta(config_from([tables]), 64)
    with pytest.raises(ValueError, match=f"no layer with the mixer attention.* of {model_type} must have"):
        FAMILIES[model_type].config(model)


_SIZES = {"vocab_size", "hidden_size", "num_attention_heads"}
_QWEN = _SIZES | {"num_key_value_heads", "head_dim", "linear_conv_kernel_dim"}
_DELTANET = {f"linear_{name}" for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
_EXPERTS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"}
ASKED_FOR = {
    "qwen3_next": _QWEN | _DELTANET | _EXPERTS,
    "qwen3_5_text": _QWEN | _DELTANET | {"intermediate_size"},
    "qwen3_5_moe_text": _QWEN | _DELTANET | _EXPERTS,
    "olmo_hybrid_unusual": _SIZES | {"intermediate_size"},
}


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_key_that_is_absent_has_their_default(name):
    """Or it is asked for."""
    model_type, _ = CASES[name]
    family, content = FAMILIES[model_type], content_of(name)
    for key in sorted(content.keys() - {"model_type", "num_hidden_layers"}):  # which other keys must fit
        without = {other: value for other, value in content.items() if other != key}
        options = {other: value for other, value in without.items() if other != "model_type"}
        expected = family.settings(AutoConfig.for_model(model_type, **options).to_dict(), "config.json")
        if key in ASKED_FOR[name]:
            with pytest.raises(ValueError, match=f"config.json has no {key}: it must say this."):
                family.settings(without, "config.json")
        else:
            assert family.settings(without, "config.json") == expected, key


def test_fraction_of_rotary_channels():
    """A quarter in these families if the file does not say."""
    for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
        content = {**content_of(name), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        letters = FAMILIES[name].settings(content, "config.json")["model"]["layers"]
        assert letters["N"]["rotary_fraction"] == 0.25


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_no_shared_expert(model_type):
    """The message is about the model and not about a key of config.json."""
    flags = "--model.layers.N.qk_norm true --model.layers.N.output_gate true --model.zero_centered_norm true"
    model = build_on_meta(load_config(["--model.layer_pattern", "LLLN", "--model.num_layers", "4", *flags.split()]), 50)
    with pytest.raises(ValueError, match=f"no shared expert, but {model_type} always has one: choose another --format"):
        FAMILIES[model_type].config(model)
