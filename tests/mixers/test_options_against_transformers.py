"""Options of attention, KDA and Mamba against the layers of transformers that have them, in float64.

Weights go over by name where both have the same layout.
"""

import pytest
import torch
from transformers import (
    BailingHybridConfig,
    DeepseekV3Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MambaConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    Qwen2MoeConfig,
)
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import (
    BailingHybridAttention,
    BailingHybridDeltaAttention,
    BailingHybridRotaryEmbedding,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridAttention, OlmoHybridGatedDeltaNet
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention, Qwen2MoeRotaryEmbedding

from tests.mixers.test_against_transformers import (
    LENGTH,
    _float64,  # noqa: F401  # a fixture for every test
    assert_equal,
    causal_mask,
    drawn,
    inputs,
    load,
)
from torchlmoe.interop import Rule, deepseek_v2, kimi_linear, mamba, mamba2
from torchlmoe.interop.steps import Flatten, Reorder, Split
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS

ROWS = SequenceLayout.of_rows(2, LENGTH)
SIZES = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, attn_implementation="eager")


def with_biases(mixer):
    """No bias is zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in mixer.named_parameters():
        if name.endswith("bias"):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer


def ours_of(name, **options):
    return with_biases(drawn(MIXERS[name](48, init_std=0.2, **options)))


def attention_of(**options):
    return ours_of("attention", num_heads=6, num_kv_heads=2, **options)


def check_attention(ours, theirs, rotary, table=None):
    """rotary: makes their phases, or None for no positions. table: None where names and layouts are the same."""
    if table is None:
        theirs.load_state_dict(ours.state_dict())
    else:
        load(theirs, ours, table)
    x = inputs()
    with torch.enable_grad():
        phases = None if rotary is None else rotary(x, torch.arange(LENGTH)[None])
        expected = theirs(x, position_embeddings=phases, attention_mask=causal_mask())[0]
        assert_equal(ours(x, sequence=ROWS), expected, x)


@torch.no_grad()
def test_biases_on_q_k_v_of_qwen2_moe():
    config = Qwen2MoeConfig(**SIZES, qkv_bias=True)
    check_attention(attention_of(qkv_bias=True), Qwen2MoeAttention(config, 0), Qwen2MoeRotaryEmbedding(config))


SCALED = dict(factor=8.0, original_max_position_embeddings=32)
ROPES = {
    "linear": dict(factor=8.0),
    "llama3": dict(**SCALED, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": dict(**SCALED, beta_fast=4.0),
}


@pytest.mark.parametrize("kind", ROPES)
@torch.no_grad()
def test_biases_and_rope_scaling_of_llama(kind):
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **ROPES[kind]}
    config = LlamaConfig(**SIZES, attention_bias=True, head_dim=10, rope_parameters=parameters)
    options = dict(qkv_bias=True, output_bias=True, head_dim=10, rope_scaling={"type": kind, **ROPES[kind]})
    check_attention(attention_of(**options), LlamaAttention(config, 0), LlamaRotaryEmbedding(config))


@torch.no_grad()
def test_scale_of_granite():
    config = GraniteMoeHybridConfig(**SIZES, attention_multiplier=0.37, mamba_n_heads=6)
    ours = attention_of(softmax_scale=0.37, rotary_fraction=0.0)
    check_attention(ours, GraniteMoeHybridAttention(config, 0), None)


@torch.no_grad()
def test_norm_of_all_heads_of_olmo_hybrid():
    config = OlmoHybridConfig(**SIZES, rms_norm_eps=1e-6)
    ours = attention_of(qk_norm="all_heads", rotary_fraction=0.0)
    check_attention(ours, OlmoHybridAttention(config, 0), None)


LATENT = dict(
    hidden_size=48, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=10, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=6, attn_implementation="eager",
)  # fmt: skip
OUR_LATENT = dict(num_heads=3, head_dim=12, kv_rank=10, value_dim=6, rotary_fraction=1 / 3)
TURNED = (0, 2, 1, 3)  # theirs turns neighbours, ours halves
BIAS_OF_LATENT = Rule(
    "kv_a_proj_with_mqa.bias",
    ["latent.down_proj.bias", "latent.shared_key_proj.bias"],
    Reorder((*range(10), *(10 + channel for channel in TURNED))),
    Split((10, 4)),
)
YARN = dict(**SCALED, mscale=0.8, mscale_all_dim=1.5, beta_fast=4.0)


@torch.no_grad()
def test_yarn_and_biases_of_deepseek_v3():
    parameters = {"rope_type": "yarn", "rope_theta": 10_000.0, **YARN}
    config = DeepseekV3Config(**LATENT, q_lora_rank=12, attention_bias=True, rope_parameters=parameters)
    ours = ours_of(
        "attention", **OUR_LATENT, q_rank=12, qkv_bias=True, output_bias=True, rope_scaling={"type": "yarn", **YARN}
    )
    table = deepseek_v2.latent_attention_rules(head_dim=12, shared_key_dim=4, kv_rank=10)
    table += [
        BIAS_OF_LATENT,
        Rule("q_a_proj.bias", "q_proj.down_proj.bias"),
        Rule("o_proj.bias", "o_proj.bias"),
    ]
    check_attention(ours, DeepseekV3Attention(config, 0), DeepseekV3RotaryEmbedding(config), table)


@torch.no_grad()
def test_gate_per_head_of_ling():
    parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    config = BailingHybridConfig(**LATENT, attention_bias=True, rope_parameters=parameters)
    ours = ours_of("attention", **OUR_LATENT, qkv_bias=True, output_bias=True, output_gate="per_head")
    table = deepseek_v2.latent_attention_rules(head_dim=12, shared_key_dim=4, kv_rank=10, full_rank_q=True)
    table += [BIAS_OF_LATENT, Rule("g_proj.weight", "gate_proj.weight"), Rule("o_proj.bias", "o_proj.bias")]
    check_attention(ours, BailingHybridAttention(config, 0), BailingHybridRotaryEmbedding(config), table)


@torch.no_grad()
def test_bounded_decay_of_ling():
    config = BailingHybridConfig(
        hidden_size=48, linear_num_heads=3, linear_head_dim=8, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
        kda_safe_gate=True, kda_lower_bound=-5.0,
    )  # fmt: skip
    theirs = BailingHybridDeltaAttention(config, layer_idx=0)
    ours = ours_of("kda", num_heads=3, head_dim=8, full_rank_decay=True, full_rank_gate=True, decay_lower_bound=-5.0)
    ours.decay.dt_bias.add_(4.0)  # to where the bound is felt
    renamed = {"f_a_proj": None, "f_b_proj": None, "g_a_proj": None, "g_b_proj": None, "A_log": None}
    table = [
        rule
        for rule in kimi_linear.kda_rules(num_heads=3, head_dim=8, conv_size=4)
        if not any(name in rule.theirs[0] for name in renamed)
    ]
    table += [
        Rule("forget_gate.f_proj.weight", "decay_proj.weight"),
        Rule("g_proj.weight", "gate_proj.weight"),
        Rule("forget_gate.A_log", "decay.A_log"),
    ]
    load(theirs, ours, table)
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=ROWS), theirs(x), x)


@torch.no_grad()
def test_gated_deltanet_of_olmo_hybrid():
    config = OlmoHybridConfig(
        **SIZES, linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=8, linear_value_head_dim=12,
        linear_allow_neg_eigval=True,
    )  # fmt: skip
    theirs = OlmoHybridGatedDeltaNet(config, layer_idx=0)
    ours = ours_of("gated_deltanet", num_heads=3, head_dim=8, expand_v=1.5, negative_eigenvalues=True, norm_eps=1e-5)
    table = [
        *(Rule(f"{name}_proj.weight", f"{name}_proj.weight") for name in "qkvabo"),
        Rule("g_proj.weight", "gate_proj.weight"),
        Rule(
            "conv1d.weight",
            [f"{name}_conv.weight" for name in "qkv"],
            Flatten((1, 4), dim=1),
            Split((24, 24, 36)),
        ),
        Rule("A_log", "decay.A_log"),
        Rule("dt_bias", "decay.dt_bias"),
        Rule("o_norm.weight", "norm.weight"),
    ]
    load(theirs, ours, table)
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=ROWS), theirs(x), x)


@torch.no_grad()
def test_biases_and_head_width_of_nemotron_h():
    """Whose heads are not those of a multiple of the stream's width."""
    config = NemotronHConfig(
        hidden_size=48, mamba_num_heads=6, mamba_head_dim=10, ssm_state_size=8, n_groups=2, conv_kernel=4,
        chunk_size=32, layers_block_type=["mamba"], use_bias=True, use_conv_bias=False, time_step_min=0.01,
        layer_norm_epsilon=1e-6,
    )  # fmt: skip
    theirs = NemotronHMamba2Mixer(config, layer_idx=0)
    ours = ours_of(
        "mamba2", num_heads=6, head_dim=10, expand_v=1.0, state_dim=8, num_groups=2, min_step=0.01, conv_bias=False,
        proj_bias=True, norm_eps=theirs.norm.variance_epsilon,
    )  # fmt: skip
    rules = mamba2.mamba2_rules(num_heads=6, head_dim=10, state_dim=8, num_groups=2, conv_size=4)
    table = [rule for rule in rules if rule.theirs[0] != "conv1d.bias"]
    projections = ["gate_proj.bias", "v_proj.bias", "k_proj.bias", "q_proj.bias", "dt_proj.bias"]
    table += [Rule("in_proj.bias", projections, Split((60, 60, 16, 16, 6))), Rule("out_proj.bias", "o_proj.bias")]
    load(theirs, ours, table)
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=ROWS), theirs(x), x)


@torch.no_grad()
def test_biases_of_mamba():
    config = MambaConfig(
        hidden_size=48, state_size=4, expand=2, conv_kernel=4, time_step_rank=3, use_bias=True, use_conv_bias=False,
        num_hidden_layers=1,
    )  # fmt: skip
    theirs = MambaMixer(config, layer_idx=0)
    ours = ours_of("mamba", state_dim=4, step_rank=3, conv_bias=False, proj_bias=True)
    rules = mamba.mamba_rules(channels=96, state_dim=4, conv_size=4)
    table = [rule for rule in rules if rule.theirs[0] != "conv1d.bias"]
    table += [
        Rule("in_proj.bias", ["x_proj.bias", "gate_proj.bias"], Split((96, 96))),
        Rule("out_proj.bias", "o_proj.bias"),
    ]
    load(theirs, ours, table)
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=ROWS), theirs(x), x)
