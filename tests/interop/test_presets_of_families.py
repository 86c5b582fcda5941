"""Presets of published models: their config.json gives the same model, with as many parameters as transformers'."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from torchlmoe.config.load import config_from, load_config
from torchlmoe.interop.families import FAMILIES
from torchlmoe.interop.family import check_equal
from torchlmoe.model.decoder import build_on_meta, count_parameters

RECIPES = Path(__file__).parents[2] / "train_configs"
# What the hub's files hold, in the words of transformers 4.
GRANITE = dict(
    attention_bias=False, attention_dropout=0.0, attention_multiplier=0.0078125, embedding_multiplier=12,
    hidden_act="silu", init_method="mup", initializer_range=0.1,
    layer_types=(["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
    mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64, mamba_d_state=128, mamba_expand=2,
    mamba_n_groups=1, mamba_proj_bias=False, max_position_embeddings=131072, normalization_function="rmsnorm",
    num_hidden_layers=40, output_router_logits=False, position_embedding_type="nope", residual_multiplier=0.22,
    rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000, router_aux_loss_coef=0.01, tie_word_embeddings=True,
    torch_dtype="bfloat16", use_cache=True, vocab_size=100352,
)  # fmt: skip
GRANITE_TINY = GRANITE | dict(
    hidden_size=1536, intermediate_size=512, shared_intermediate_size=1024, num_local_experts=64,
    num_experts_per_tok=6, num_attention_heads=12, num_key_value_heads=4, mamba_n_heads=48, logits_scaling=6,
)  # fmt: skip
GRANITE_SMALL = GRANITE | dict(
    hidden_size=4096, intermediate_size=768, shared_intermediate_size=1536, num_local_experts=72,
    num_experts_per_tok=10, num_attention_heads=32, num_key_value_heads=8, mamba_n_heads=128, logits_scaling=16,
)  # fmt: skip
NEMOTRON_NANO = dict(
    attention_bias=False, attention_dropout=0.0, chunk_size=128, conv_kernel=4, expand=2, head_dim=128,
    hidden_dropout=0.0, hidden_size=2688,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    initializer_range=0.02, intermediate_size=1856, layer_norm_epsilon=1e-5, mamba_head_dim=64,
    mamba_hidden_act="silu", mamba_num_heads=64, mamba_proj_bias=False, mamba_ssm_cache_dtype="float32",
    max_position_embeddings=262144, mlp_bias=False, mlp_hidden_act="relu2", moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712, n_group=1, n_groups=8, n_routed_experts=128, n_shared_experts=1,
    norm_eps=1e-5, norm_topk_prob=True, num_attention_heads=32, num_experts_per_tok=6, num_hidden_layers=52,
    num_key_value_heads=2, num_logits_to_keep=1, partial_rotary_factor=1.0, rescale_prenorm_residual=True,
    residual_in_fp32=False, rope_theta=10000, routed_scaling_factor=2.5, sliding_window=None, ssm_state_size=128,
    tie_word_embeddings=False, time_step_floor=0.0001, time_step_limit=[0.0, math.inf], time_step_max=0.1,
    time_step_min=0.001, topk_group=1, use_bias=False, use_cache=True, use_conv_bias=True, use_mamba_kernels=True,
    vocab_size=131072,
)  # fmt: skip
KIMI_LINEAR = dict(
    vocab_size=163840, hidden_size=2304, intermediate_size=9216, num_hidden_layers=27,
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
    vocab_size=200064, hidden_size=6144, intermediate_size=9216, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, head_dim=128, rotary_dim=64, rope_theta=10_000_000,
    rms_norm_eps=1e-5, num_local_experts=32, num_experts_per_tok=2, router_aux_loss_coef=0.001, block_size=256,
    layer_types=(["linear_attention"] * 7 + ["full_attention"]) * 10,
    full_attn_alpha_factor=3.5565588200778455, full_attn_beta_factor=1.0,
    linear_attn_alpha_factor=3.5565588200778455, linear_attn_beta_factor=1.0,
    mlp_alpha_factor=3.5565588200778455, mlp_beta_factor=1.0, tie_word_embeddings=False, hidden_act="silu",
)  # fmt: skip
# Recipe -> family, parameters as published (31.6 billion are the 30B of Nemotron's name), and config.json.
PUBLISHED = {
    "granite_4_tiny": ("granitemoehybrid", 7e9, GRANITE_TINY),
    "granite_4_small": ("granitemoehybrid", 32e9, GRANITE_SMALL),
    "nemotron_3_nano": ("nemotron_h", 31.6e9, NEMOTRON_NANO),
    "kimi_linear_48b": ("kimi_linear", 48e9, KIMI_LINEAR),
    "minimax_text_01": ("minimax", 456e9, MINIMAX_TEXT_01),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name, tmp_path):
    model_type, published, hub = PUBLISHED[name]
    family, hub = FAMILIES[model_type], {"model_type": model_type, **hub}
    config = load_config(["--job.config_file", str(RECIPES / f"{name}.toml")])
    ours = build_on_meta(config, config.model.vocab_size)
    of_hub = build_on_meta(config_from([family.settings(hub, "hub")]), hub["vocab_size"])
    check_equal(ours, of_hub, model_type)

    (tmp_path / "config.json").write_text(json.dumps(hub))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert count_parameters(ours) == sum(parameter.numel() for parameter in theirs.parameters())
    assert count_parameters(ours) == pytest.approx(published, rel=0.03)
