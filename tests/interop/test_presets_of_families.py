"""Presets of published models: as many parameters as transformers' model of the same config.json has."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from torchlmoe.config.load import config_from, load_config
from torchlmoe.interop.families import FAMILIES
from torchlmoe.interop.family import check_equal
from torchlmoe.model.decoder import build_on_meta, count_parameters

RECIPES = Path(__file__).parents[2] / "train_configs"
# What config.json of the published models says of their sizes, the choices of programs left out.
KIMI_LINEAR_48B = dict(
    model_type="kimi_linear", vocab_size=163840, hidden_size=2304, intermediate_size=9216, num_hidden_layers=27,
    num_attention_heads=32, num_key_value_heads=32, head_dim=72, kv_lora_rank=512, q_lora_rank=None,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, mla_use_nope=True, rms_norm_eps=1e-5,
    linear_attn_config=dict(
        full_attn_layers=[4, 8, 12, 16, 20, 24, 27],
        kda_layers=[1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        head_dim=128, num_heads=32, short_conv_kernel_size=4,
    ),
    first_k_dense_replace=1, moe_layer_freq=1, moe_intermediate_size=1024, num_experts=256, num_experts_per_token=8,
    num_shared_experts=1, num_expert_group=1, topk_group=1, use_grouped_topk=True, moe_renormalize=True,
    moe_router_activation_func="sigmoid", routed_scaling_factor=2.446, num_nextn_predict_layers=0, rope_theta=10000.0,
    rope_scaling=None, hidden_act="silu", tie_word_embeddings=False, model_max_length=1048576,
)  # fmt: skip
MINIMAX_TEXT_01 = dict(
    model_type="minimax", vocab_size=200064, hidden_size=6144, intermediate_size=9216, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, head_dim=128, rotary_dim=64, rope_theta=10_000_000,
    rms_norm_eps=1e-5, num_local_experts=32, num_experts_per_tok=2, router_aux_loss_coef=0.001, block_size=256,
    layer_types=(["linear_attention"] * 7 + ["full_attention"]) * 10,
    full_attn_alpha_factor=3.5565588200778455, full_attn_beta_factor=1.0,
    linear_attn_alpha_factor=3.5565588200778455, linear_attn_beta_factor=1.0,
    mlp_alpha_factor=3.5565588200778455, mlp_beta_factor=1.0, tie_word_embeddings=False, hidden_act="silu",
)  # fmt: skip
# A preset, the published config.json, and the published numbers of parameters: all, and without embedding and output
# head those that a token meets.
PRESETS = {
    "kimi_linear_48b": (KIMI_LINEAR_48B, 48e9, 3e9),
    "minimax_text_01": (MINIMAX_TEXT_01, 456e9, 45.9e9),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_published_model(name, tmp_path):
    content, published, active = PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = load_config(["--job.config_file", str(RECIPES / f"{name}.toml")])
    ours, family = build_on_meta(config, config.model.vocab_size), FAMILIES[content["model_type"]]
    read = build_on_meta(config_from([family.settings(content, "config.json")]), content["vocab_size"])
    check_equal(ours, read, name)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert count_parameters(ours) == sum(parameter.numel() for parameter in theirs.parameters())
    assert count_parameters(ours) == pytest.approx(published, rel=0.03)
    assert count_parameters(ours, active=True, embeddings=False) == pytest.approx(active, rel=0.1)
