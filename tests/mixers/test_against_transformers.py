"""Mixers against transformers' layers with copied weights, in float64: Qwen3-Next (Gated DeltaNet and gated attention),
Kimi-Linear (KDA and latent attention), DeepSeek-V2 (latent attention), MiniMax (lightning attention) and Mamba2.
"""

import pytest
import torch
from transformers import DeepseekV2Config, KimiLinearConfig, Mamba2Config, MiniMaxConfig, Qwen3NextConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention, KimiLinearDeltaAttention
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextGatedDeltaNet,
    Qwen3NextRotaryEmbedding,
)

from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.base import Place

LENGTH = 100


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def qwen3_next(**sizes):
    return Qwen3NextConfig(hidden_size=48, rms_norm_eps=1e-6, attn_implementation="eager", **sizes)


def drawn(mixer):
    with named_draws(mixer, seed=0):
        mixer.init_weights()
    return mixer


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, LENGTH, 48, generator=generator).requires_grad_()


def causal_mask():
    return torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]


def assert_equal(ours, theirs, x):
    """Theirs goes through float32 in norms, softmax and recurrence even in float64: so near is as near as it gets."""
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    for found, expected, tolerance in ((ours, theirs, 1e-6), (*gradients, 3e-6)):
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("num_key_heads", [2, 4])
@torch.no_grad()
def test_gated_deltanet(num_key_heads):
    heads, key_dim, value_dim = 4, 8, 16
    theirs = Qwen3NextGatedDeltaNet(
        qwen3_next(
            linear_num_key_heads=num_key_heads,
            linear_num_value_heads=heads,
            linear_key_head_dim=key_dim,
            linear_value_head_dim=value_dim,
            linear_conv_kernel_dim=4,
        ),
        layer_idx=0,
    )
    ours = drawn(
        MIXERS["gated_deltanet"](
            48, num_heads=heads, num_key_heads=num_key_heads, head_dim=key_dim, expand_v=2.0, init_std=0.2
        )
    )
    # Theirs interleaves, per key head, its q, k and its value heads' v, z; and their b, a.
    per_key = [
        projection.weight.unflatten(0, (num_key_heads, -1))
        for projection in (ours.q_proj, ours.k_proj, ours.v_proj, ours.gate_proj)
    ]
    theirs.in_proj_qkvz.weight.copy_(torch.cat(per_key, 1).flatten(0, 1))
    gates = [projection.weight.unflatten(0, (num_key_heads, -1)) for projection in (ours.b_proj, ours.a_proj)]
    theirs.in_proj_ba.weight.copy_(torch.cat(gates, 1).flatten(0, 1))
    convolutions = torch.cat([ours.q_conv.weight, ours.k_conv.weight, ours.v_conv.weight])
    theirs.conv1d.weight.copy_(convolutions[:, None])
    theirs.A_log.copy_(ours.decay.A_log)
    theirs.dt_bias.copy_(ours.decay.dt_bias)
    ours.norm.weight.uniform_(0.5, 1.5)
    theirs.norm.weight.copy_(ours.norm.weight)
    theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x), x)


@torch.no_grad()
def test_gated_attention():
    config = qwen3_next(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    )
    theirs = Qwen3NextAttention(config, layer_idx=0)
    ours = drawn(
        MIXERS["attention"](
            48, num_heads=4, num_kv_heads=2, head_dim=16, rotary_fraction=0.25, qk_norm=True, output_gate=True,
            init_std=0.2,
        )
    )  # fmt: skip
    # Theirs projects, per head, q and then its gate; its norms' weights are offsets from one.
    per_head = [projection.weight.unflatten(0, (4, -1)) for projection in (ours.q_proj, ours.gate_proj)]
    theirs.q_proj.weight.copy_(torch.cat(per_head, 1).flatten(0, 1))
    theirs.k_proj.weight.copy_(ours.k_proj.weight)
    theirs.v_proj.weight.copy_(ours.v_proj.weight)
    theirs.o_proj.weight.copy_(ours.o_proj.weight)
    for name in ("q_norm", "k_norm"):
        getattr(ours, name).weight.uniform_(0.5, 1.5)
        getattr(theirs, name).weight.copy_(getattr(ours, name).weight - 1)
    x = inputs()
    positions = torch.arange(LENGTH)[None]
    with torch.enable_grad():
        phases = Qwen3NextRotaryEmbedding(config)(x, positions)
        expected = theirs(x, position_embeddings=phases, attention_mask=causal_mask())[0]
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), expected, x)


def copy_(*pairs):
    """Each parameter of theirs from ours, which may be a list of parts to be laid one after another."""
    for theirs, ours in pairs:
        whole = torch.cat(list(ours)) if isinstance(ours, list) else ours
        theirs.copy_(whole.view_as(theirs))


@torch.no_grad()
def test_kimi_delta_attention():
    config = KimiLinearConfig(
        hidden_size=48,
        linear_num_heads=3,
        linear_head_dim=8,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
    )
    theirs = KimiLinearDeltaAttention(config, layer_idx=0)
    ours = drawn(MIXERS["kda"](48, num_heads=3, head_dim=8, init_std=0.2))
    ours.norm.weight.uniform_(0.5, 1.5)
    copy_(
        (theirs.q_proj.weight, ours.q_proj.weight),
        (theirs.k_proj.weight, ours.k_proj.weight),
        (theirs.v_proj.weight, ours.v_proj.weight),
        (theirs.conv1d.weight, [ours.q_conv.weight, ours.k_conv.weight, ours.v_conv.weight]),
        (theirs.forget_gate.f_a_proj.weight, ours.decay_proj.down_proj.weight),
        (theirs.forget_gate.f_b_proj.weight, ours.decay_proj.up_proj.weight),
        (theirs.forget_gate.A_log, ours.decay.A_log),
        (theirs.forget_gate.dt_bias, ours.decay.dt_bias),
        (theirs.b_proj.weight, ours.b_proj.weight),
        (theirs.g_a_proj.weight, ours.gate_proj.down_proj.weight),
        (theirs.g_b_proj.weight, ours.gate_proj.up_proj.weight),
        (theirs.o_norm.weight, ours.norm.weight),
        (theirs.o_proj.weight, ours.o_proj.weight),
    )
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x), x)


@pytest.mark.parametrize("index", [0, 2, 3])
@torch.no_grad()
def test_lightning_attention(index):
    config = MiniMaxConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=4, block_size=32)
    theirs = MiniMaxLightningAttention(config, layer_idx=index)
    ours = drawn(MIXERS["lightning"](48, Place(index, num_layers=4), num_heads=3, init_std=0.2))
    ours.norm.weight.uniform_(0.5, 1.5)
    # Theirs projects q, k and v of a head together.
    per_head = [projection.weight.unflatten(0, (3, -1)) for projection in (ours.q_proj, ours.k_proj, ours.v_proj)]
    copy_(
        (theirs.qkv_proj.weight, torch.cat(per_head, 1)),
        (theirs.output_gate.weight, ours.gate_proj.weight),
        (theirs.norm.weight, ours.norm.weight),
        (theirs.out_proj.weight, ours.o_proj.weight),
    )
    x = inputs()
    with torch.enable_grad():
        expected = theirs(x, position_embeddings=None, attention_mask=None)[0]
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), expected, x)


@pytest.mark.parametrize(("num_groups", "limits"), [(1, (0.0, None)), (2, (0.01, 0.5))])
@torch.no_grad()
def test_mamba2(num_groups, limits):
    config = Mamba2Config(
        hidden_size=48, num_heads=6, head_dim=16, state_size=8, n_groups=num_groups, expand=2, conv_kernel=4,
        chunk_size=32, num_hidden_layers=1, layer_norm_epsilon=1e-6,
        time_step_limit=(limits[0], limits[1] or float("inf")),
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0)
    ours = drawn(
        MIXERS["mamba2"](
            48, num_heads=6, state_dim=8, num_groups=num_groups, min_step=limits[0], max_step=limits[1], init_std=0.2
        )
    )
    for parameter in (ours.D, ours.norm.weight):
        parameter.uniform_(0.5, 1.5)
    projections = (ours.gate_proj, ours.v_proj, ours.k_proj, ours.q_proj, ours.dt_proj)
    convolutions = (ours.v_conv, ours.k_conv, ours.q_conv)
    copy_(
        (theirs.in_proj.weight, [projection.weight for projection in projections]),
        (theirs.conv1d.weight, [convolution.weight for convolution in convolutions]),
        (theirs.conv1d.bias, [convolution.bias for convolution in convolutions]),
        (theirs.A_log, ours.decay.A_log),
        (theirs.dt_bias, ours.decay.dt_bias),
        (theirs.D, ours.D),
        (theirs.norm.weight, ours.norm.weight),
        (theirs.out_proj.weight, ours.o_proj.weight),
    )
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x), x)


LATENT_SIZES = dict(
    hidden_size=48, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=10, q_lora_rank=12, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=6, num_hidden_layers=1, attn_implementation="eager",
)  # fmt: skip


def latent_attention(**rotary):
    sizes = dict(num_heads=3, head_dim=12, kv_rank=10, q_rank=12, value_dim=6)
    ours = drawn(MIXERS["attention"](48, **sizes, init_std=0.3, **rotary))
    for norm in (ours.q_proj.activation, ours.latent.norm):
        norm.weight.uniform_(0.5, 1.5)
    return ours


def copy_latent_attention_(theirs, ours, shared):
    """shared: of each shared channel of theirs (they stand last in a head), which of ours it is (they stand first)."""
    q_weight = ours.q_proj.up_proj.weight.unflatten(0, (3, 12))
    copy_(
        (theirs.q_a_proj.weight, ours.q_proj.down_proj.weight),
        (theirs.q_a_layernorm.weight, ours.q_proj.activation.weight),
        (theirs.q_b_proj.weight, torch.cat([q_weight[:, 4:], q_weight[:, shared]], 1)),
        (
            theirs.kv_a_proj_with_mqa.weight,
            [ours.latent.down_proj.weight, ours.latent.shared_key_proj.weight[shared]],
        ),
        (theirs.kv_a_layernorm.weight, ours.latent.norm.weight),
        (theirs.kv_b_proj.weight, ours.latent.up_proj.weight),
        (theirs.o_proj.weight, ours.o_proj.weight),
    )


@torch.no_grad()
def test_latent_attention_of_deepseek_v2():
    config = DeepseekV2Config(**LATENT_SIZES, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    theirs, ours = DeepseekV2Attention(config, layer_idx=0), latent_attention(rotary_fraction=1 / 3)
    copy_latent_attention_(theirs, ours, shared=[0, 2, 1, 3])  # theirs turns neighbours, ours halves
    x = inputs()
    with torch.enable_grad():
        phases = DeepseekV2RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
        expected = theirs(x, position_embeddings=phases, attention_mask=causal_mask())[0]
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), expected, x)


@torch.no_grad()
def test_latent_attention_of_kimi_linear():
    theirs = KimiLinearAttention(KimiLinearConfig(**LATENT_SIZES), layer_idx=0)
    ours = latent_attention(rotary_fraction=0.0, shared_key_dim=4)
    copy_latent_attention_(theirs, ours, shared=[0, 1, 2, 3])
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x, attention_mask=causal_mask())[0], x)
