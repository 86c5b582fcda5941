"""Mixers against transformers' layers with converted weights, in float64: Qwen3-Next (Gated DeltaNet, gated attention),
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

from torchlmoe.interop import convert, deepseek_v2, kimi_linear, mamba2, minimax, qwen3_next
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


def qwen3_next_config(**sizes):
    return Qwen3NextConfig(hidden_size=48, rms_norm_eps=1e-6, attn_implementation="eager", **sizes)


def drawn(mixer):
    with named_draws(mixer, seed=0):
        mixer.init_weights()
    # Where all are one, none could be told from another.
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        if (parameter == 1).all():
            parameter.uniform_(0.5, 1.5, generator=generator)
    return mixer


def load(theirs, ours, table):
    theirs.load_state_dict(convert(ours.state_dict(), table, reverse=True))


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
        qwen3_next_config(
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
    table = qwen3_next.gated_deltanet_rules(
        num_heads=heads, num_key_heads=num_key_heads, key_dim=key_dim, value_dim=value_dim, conv_size=4
    )
    load(theirs, ours, table)
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x), x)


@torch.no_grad()
def test_gated_attention():
    config = qwen3_next_config(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    )
    theirs = Qwen3NextAttention(config, layer_idx=0)
    ours = drawn(
        MIXERS["attention"](
            48, num_heads=4, num_kv_heads=2, head_dim=16, rotary_fraction=0.25, qk_norm=True, output_gate=True,
            zero_centered_norm=True, init_std=0.2,
        )
    )  # fmt: skip
    load(theirs, ours, qwen3_next.gated_attention_rules(num_heads=4, head_dim=16))
    x = inputs()
    positions = torch.arange(LENGTH)[None]
    with torch.enable_grad():
        phases = Qwen3NextRotaryEmbedding(config)(x, positions)
        expected = theirs(x, position_embeddings=phases, attention_mask=causal_mask())[0]
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), expected, x)


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
    load(theirs, ours, kimi_linear.kda_rules(num_heads=3, head_dim=8, conv_size=4))
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x), x)


@pytest.mark.parametrize("index", [0, 2, 3])
@torch.no_grad()
def test_lightning_attention(index):
    config = MiniMaxConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=4, block_size=32)
    theirs = MiniMaxLightningAttention(config, layer_idx=index)
    ours = drawn(MIXERS["lightning"](48, Place(index, num_layers=4), num_heads=3, init_std=0.2))
    weights = convert(ours.state_dict(), minimax.lightning_rules(num_heads=3, head_dim=16), reverse=True)
    left = theirs.load_state_dict(weights, strict=False)
    assert (sorted(left.missing_keys), left.unexpected_keys) == (sorted(minimax.CONSTANTS), [])
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
    table = mamba2.mamba2_rules(num_heads=6, head_dim=16, state_dim=8, num_groups=num_groups, conv_size=4)
    load(theirs, ours, table)
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x), x)


LATENT_SIZES = dict(
    hidden_size=48, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=10, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=6, num_hidden_layers=1, attn_implementation="eager",
)  # fmt: skip


def latent_attention(**options):
    sizes = dict(num_heads=3, head_dim=12, kv_rank=10, value_dim=6)
    return drawn(MIXERS["attention"](48, **sizes, init_std=0.3, **options))


def latent_sizes(q_rank):
    return dict(head_dim=12, shared_key_dim=4, kv_rank=10, full_rank_q=q_rank is None)


@pytest.mark.parametrize("q_rank", [12, None])
@torch.no_grad()
def test_latent_attention_of_deepseek_v2(q_rank):
    rotary = {"rope_type": "default", "rope_theta": 10_000.0}
    config = DeepseekV2Config(**LATENT_SIZES, q_lora_rank=q_rank, rope_parameters=rotary)
    theirs, ours = DeepseekV2Attention(config, layer_idx=0), latent_attention(q_rank=q_rank, rotary_fraction=1 / 3)
    load(theirs, ours, deepseek_v2.latent_attention_rules(**latent_sizes(q_rank)))
    x = inputs()
    with torch.enable_grad():
        phases = DeepseekV2RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
        expected = theirs(x, position_embeddings=phases, attention_mask=causal_mask())[0]
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), expected, x)


@pytest.mark.parametrize("q_rank", [12, None])
@torch.no_grad()
def test_latent_attention_of_kimi_linear(q_rank):
    theirs = KimiLinearAttention(KimiLinearConfig(**LATENT_SIZES, q_lora_rank=q_rank), layer_idx=0)
    ours = latent_attention(q_rank=q_rank, rotary_fraction=0.0, shared_key_dim=4)
    load(theirs, ours, kimi_linear.latent_attention_rules(**latent_sizes(q_rank)))
    x = inputs()
    with torch.enable_grad():
        assert_equal(ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x, attention_mask=causal_mask())[0], x)
