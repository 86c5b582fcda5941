"""Presets of published hybrids: their config.json gives the same model, with as many parameters as transformers'."""

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
# Recipe -> family, parameters as published (31.6 billion are the 30B of Nemotron's name), and config.json.
PUBLISHED = {
    "granite_4_tiny": ("granitemoehybrid", 7e9, GRANITE_TINY),
    "granite_4_small": ("granitemoehybrid", 32e9, GRANITE_SMALL),
    "nemotron_3_nano": ("nemotron_h", 31.6e9, NEMOTRON_NANO),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name, tmp_path):
    model_type, published, hub = PUBLISHED[name]
    family = FAMILIES[model_type]
    config = load_config(["--job.config_file", str(RECIPES / f"{name}.toml")])
    ours = build_on_meta(config, config.model.vocab_size)
    of_hub = build_on_meta(config_from([family.settings({"model_type": model_type, **hub}, "hub")]), hub["vocab_size"])
    check_equal(ours, of_hub, model_type)

    (tmp_path / "config.json").write_text(json.dumps(family.config(ours)))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert count_parameters(ours) == sum(parameter.numel() for parameter in theirs.parameters())
    assert count_parameters(ours) == pytest.approx(published, rel=0.03)
