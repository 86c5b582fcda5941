"""Families of Mamba hybrids: older files, and errors of import and export."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from tests.interop.families import CASES, SIZES, tensors_of, their_model
from torchlmoe.checkpoint import open_model
from torchlmoe.config.load import config_from
from torchlmoe.interop.families import FAMILIES
from torchlmoe.interop.family import check_equal
from torchlmoe.model.decoder import build_on_meta


def test_tensors_of_multi_token_prediction_are_left_out(tmp_path):
    model_type, options = CASES["nemotron_h"]
    their_model(model_type, **options).save_pretrained(tmp_path)
    before = open_model(tmp_path)[0].state_dict()
    extra = {"mtp.layers.0.norm.weight": torch.ones(32)}
    save_file({**tensors_of(tmp_path), **extra}, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(content))
    after = open_model(tmp_path)[0].state_dict()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


REFUSED = [
    ("mamba", "hidden_act", "gelu", "hidden_act = 'gelu', an option without a counterpart"),
    ("mamba", "sandwich_norm", True, "sandwich_norm = True, an option without a counterpart"),
    ("mamba2", "hidden_act", "relu", "hidden_act = 'relu', an option without a counterpart"),
    ("mamba2", "time_step_limit", [0.1], "time_step_limit = [0.1], which must be two numbers."),
    ("bamba", "mlp_bias", True, "mlp_bias = True, an option without a counterpart"),
    ("bamba", "attention_dropout", 0.1, "attention_dropout = 0.1, an option without a counterpart"),
    ("granitemoehybrid", "position_embedding_type", "alibi", "position_embedding_type = 'alibi', an option without"),
    ("granitemoehybrid", "layer_types", ["conv"] * 4, "'conv' among its layer_types, which has no counterpart"),
    ("granitemoehybrid", "shared_intermediate_size", 0, "shared_intermediate_size = 0, which must be at least 1."),
    ("nemotron_h", "mlp_hidden_act", "silu", "mlp_hidden_act = 'silu', an option without a counterpart"),
    ("nemotron_h", "tie_word_embeddings", True, "tie_word_embeddings = True, an option without a counterpart"),
    ("nemotron_h", "sliding_window", 128, "sliding_window = 128, an option without a counterpart"),
    ("nemotron_h", "attention_head_dim", 64, "attention_head_dim = 64, an option without a counterpart"),
    ("nemotron_h", "layers_block_type", [], "hybrid_override_pattern = '', which must consist of M * E -."),
]


def content_of(model_type):
    """The config.json of a family's first case."""
    return json.loads(AutoConfig.for_model(model_type, **CASES[model_type][1]).to_json_string(use_diff=False))


OLDER = {
    "mamba": dict(d_model=32, d_inner=64, n_layer=2, ssm_cfg={}, rms_norm=True, time_step_rank="auto"),
    "mamba2": dict(time_step_limit=[0.0, math.inf], norm_before_gate=True, rms_norm=True),
    "bamba": dict(
        rope_parameters=None, rope_theta=10000.0, rope_scaling=None, attn_rotary_emb=4, mamba_d_head="auto",
        time_step_limit=None,
    ),
    "nemotron_h": dict(layers_block_type=None, hybrid_override_pattern="ME*-M", attention_head_dim=16, norm_eps=1e-5),
}  # fmt: skip


@pytest.mark.parametrize("model_type", OLDER)
def test_keys_of_older_files(model_type):
    content, family = content_of(model_type), FAMILIES[model_type]
    models = [
        build_on_meta(config_from([family.settings(each, "")]), SIZES["vocab_size"])
        for each in (content, content | OLDER[model_type])
    ]
    check_equal(*models, model_type)


@pytest.mark.parametrize(("model_type", "key", "value", "message"), REFUSED)
def test_options_without_a_counterpart_here(model_type, key, value, message):
    with pytest.raises(ValueError, match=r"^here/config\.json has") as refusal:
        FAMILIES[model_type].settings(content_of(model_type) | {key: value}, "here/config.json")
    assert message in str(refusal.value)


OTHER_MAMBA2 = dict(mixer="mamba2", num_heads=8, num_groups=4, mixer_branch_weight=0.22, mlp_branch_weight=0.22)
LACKING = [
    ("mamba", "L", {"expand": 1.5}, "A mixer is 48 channels wide, which mamba needs to be a multiple of dim = 32"),
    ("mamba", "L", {"mlp": "dense"}, "blocks.0.feed_forward"),
    ("mamba2", "L", {"head_dim": 5}, "A mixer is 40 channels wide, which mamba2 needs to be a multiple of dim = 32"),
    ("mamba2", "L", {"mixer": "gla", "num_heads": 4}, "Block 0 has the mixer gla; mamba2 has only mamba2"),
    ("bamba", "N", {"qk_norm": True}, "blocks.1.mixer.qk_norm is True, for which bamba has no counterpart"),
    ("bamba", "N", {"mlp": "none"}, "blocks.1.feed_forward"),
    ("granitemoehybrid", "N", {"rotary_fraction": 0.5}, "blocks.1.mixer.rotary_dim is 4"),
    ("granitemoehybrid", "N", {"mlp_branch_weight": 0.5}, "blocks.1.residual is Residual("),
    ("granitemoehybrid", "N", OTHER_MAMBA2, "blocks.1.mixer."),
    ("nemotron_h", "A", {"rotary_fraction": 1.0}, "blocks.2.mixer.rotary_dim is 16"),
    ("nemotron_h", "M", {"max_step": 0.5}, "blocks.0.mixer.decay.step_limits is (0.001, 0.5)"),
    ("nemotron_h", "M", {"mlp": "dense"}, "blocks.0.feed_forward"),
    ("nemotron_h", "D", {"mlp_options": {"activation": "swiglu"}}, "blocks.3.feed_forward"),
]


def check_export(model_type, tables):
    family, size = FAMILIES[model_type], SIZES["vocab_size"]
    model = build_on_meta(config_from([tables]), size)
    check_equal(model, build_on_meta(config_from([family.settings(family.config(model), "")]), size), model_type)


@pytest.mark.parametrize(("model_type", "letter", "options", "message"), LACKING)
def test_options_without_a_counterpart_there(model_type, letter, options, message):
    tables = FAMILIES[model_type].settings(content_of(model_type), "")
    check_export(model_type, tables)
    table = tables["model"]["layers"][letter]
    if "mixer" in options or "mlp" in options:  # with none of the old one's settings
        part = ("mlp", "mlp_options") if "mlp" in options else table.keys() - {"mlp", "mlp_options"}
        for name in part:
            table.pop(name, None)
    table |= options
    with pytest.raises(ValueError, match=r"choose another --format\.$") as refusal:
        check_export(model_type, tables)
    assert message in str(refusal.value)


def test_a_shared_expert_is_needed():
    tables = FAMILIES["granitemoehybrid"].settings(content_of("granitemoehybrid"), "")
    del tables["moe"]["shared_expert_dim"]
    with pytest.raises(ValueError, match="no shared expert, but granitemoehybrid always has one"):
        check_export("granitemoehybrid", tables)
