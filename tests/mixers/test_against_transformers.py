"""Mixers against transformers with copied weights, in float64: Qwen3-Next's Gated DeltaNet and attention, Mamba."""

import pytest
import torch
from transformers import MambaConfig, Qwen3NextConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextGatedDeltaNet,
    Qwen3NextRotaryEmbedding,
)

from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers import MIXERS

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
        assert_equal(ours(x, sequence=Sequence.of_rows(2, LENGTH)), theirs(x), x)


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
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    with torch.enable_grad():
        phases = Qwen3NextRotaryEmbedding(config)(x, positions)
        expected = theirs(x, position_embeddings=phases, attention_mask=mask)[0]
        assert_equal(ours(x, sequence=Sequence.of_rows(2, LENGTH)), expected, x)


@torch.no_grad()
def test_mamba():
    config = MambaConfig(hidden_size=48, state_size=8, expand=2, conv_kernel=4, time_step_rank=5)
    theirs = MambaMixer(config, layer_idx=0)
    ours = drawn(MIXERS["mamba"](48, state_dim=8, step_rank=5, init_std=0.2))
    ours.D.uniform_(-1, 1)
    theirs.in_proj.weight.copy_(torch.cat([ours.x_proj.weight, ours.gate_proj.weight]))
    theirs.conv1d.weight.copy_(ours.x_conv.weight[:, None])
    theirs.conv1d.bias.copy_(ours.x_conv.bias)
    theirs.x_proj.weight.copy_(ours.step_B_C_proj.weight)
    theirs.dt_proj.weight.copy_(ours.step_proj.weight)
    theirs.dt_proj.bias.copy_(ours.decay.dt_bias)
    theirs.A_log.copy_(ours.decay.A_log)
    theirs.D.copy_(ours.D)
    theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=Sequence.of_rows(2, LENGTH)), theirs(x), x)
