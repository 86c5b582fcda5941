"""Norms, feature maps, gates, phases, cross entropy and packed attention against plain torch, in float64."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.layers.biased_decay import BiasedDecay, LogSigmoidDecay
from torchlmoe.layers.cross_entropy import linear_cross_entropy
from torchlmoe.layers.decay_gate import DecayGate
from torchlmoe.layers.feature_maps import taylor_features
from torchlmoe.layers.group_norms import GroupRMSNorm
from torchlmoe.layers.norms import RMSNorm, l2_norm, rms_norm
from torchlmoe.layers.rotary import rotary_phases, rotate
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.token_shift import TokenShift
from torchlmoe.ops.packed_attention import packed_attention
from torchlmoe.ops.pair_products import pair_products


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(ours, theirs, leaves):
    cotangent = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, cotangent, retain_graph=True),
        torch.autograd.grad(theirs, leaves, cotangent, retain_graph=True),
    )


def test_norms():
    x, weight = randn(3, 5, 16), randn(16, seed=1)
    assert_same(rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6), [x, weight])
    groups = GroupRMSNorm(16, 2).double()
    groups.weight.data.copy_(weight)
    expected = torch.cat([F.rms_norm(part, (8,), None, 1e-6) for part in x.chunk(2, -1)], -1) * groups.weight
    assert_same(groups(x), expected, [x, groups.weight])
    assert_same(groups(x[0, 0]), expected[0, 0], [x, groups.weight])
    assert_same(l2_norm(x, 1e-6), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), [x])
    zero = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(l2_norm(zero).sum(), zero)
    assert torch.isfinite(gradient).all()
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-6), [randn(2, 6)])


def test_weights_that_are_offsets_from_one():
    """In bfloat16 too no digit of an offset is lost to the one."""
    x, offset = randn(3, 5, 16), (randn(16, seed=1).detach() / 512).bfloat16()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + offset.double())
    norm = RMSNorm(16, zero_centered=True).double()
    norm.init_weights()
    assert not norm.weight.any()
    norm.weight.data.copy_(offset)
    assert_same(norm(x), expected, [x])
    (found,) = torch.autograd.grad(norm(x).sum(), norm.weight)
    torch.testing.assert_close(found, (expected / (1 + offset.double())).sum((0, 1)))
    norm.bfloat16()
    ones = torch.ones(1, 16)  # float32 activations show what a bfloat16 sum would lose
    torch.testing.assert_close(norm(ones)[0], 1 + offset.float(), rtol=1e-6, atol=0)
    norm.total = lambda x: x
    torch.testing.assert_close(norm(ones)[0], 1 + offset.float(), rtol=1e-6, atol=0)
    assert norm(ones.bfloat16()).dtype is torch.bfloat16


def test_norms_accumulate_in_float32():
    x = (randn(4, 4096).detach() * 100).bfloat16()
    expected = F.rms_norm(x.double(), (4096,), None, 1e-6)
    assert (rms_norm(x, None, 1e-6).double() - expected).norm() <= 3e-3 * expected.norm()


def test_polynomial_features():
    x, y = randn(3, 5, 6), randn(3, 5, 6, seed=1)
    product = (x * y).sum(-1)
    assert pair_products(x).shape == (3, 5, 21)
    assert_same((pair_products(x) * pair_products(y)).sum(-1), product.square(), [x, y])
    taylor = (taylor_features(x) * taylor_features(y)).sum(-1)
    assert_same(taylor, 1 + product + product.square() / 2, [x, y])
    torch.library.opcheck(torch.ops.torchlmoe.pair_products.default, (x,))


@pytest.mark.parametrize("channels", [None, 5])
def test_decay_gate_starts_in_its_ranges(channels):
    gate = DecayGate(200, channels, rates=(1.0, 16.0), step_limits=(2e-3, 5e-2))
    gate.init_weights()
    rate = gate.A_log.exp()
    assert rate.min() >= 1
    assert 15 < rate.max() <= 16
    log_decay, step = gate(torch.zeros(3, 200 * (channels or 1)))
    assert step.shape == ((3, 200) if channels is None else (3, 200, channels))
    assert step.min() == 2e-3  # steps are drawn from 1e-3 to 1e-1
    assert step.max() == 5e-2
    torch.testing.assert_close(log_decay, -step * (rate if channels is None else rate[:, None]))


def test_biased_decays():
    x = torch.linspace(-9, 9, 64, dtype=torch.float64).view(4, 16).requires_grad_()
    cases = [
        (LogSigmoidDecay(16, 16.0), lambda z: -torch.log1p((-z).exp()) / 16),
        (BiasedDecay(16, "exp"), lambda z: -torch.where(z < 5, z, 5.0).exp()),
        (BiasedDecay(16, "sigmoid", rate=0.6), lambda z: -0.6 / (1 + (-z).exp())),
    ]
    for decay, formula in cases:
        decay.double().bias.data.copy_(randn(16, seed=1))
        assert_same(decay(x), formula(x + decay.bias), [x, decay.bias])
        assert decay(x.bfloat16()).dtype is torch.float64
        assert decay.float()(x.bfloat16()).dtype is torch.float32


def test_rotary_is_a_complex_rotation():
    x, positions = randn(2, 7, 3, 12), torch.arange(100, 107).expand(2, -1)
    y = rotate(x, rotary_phases(positions, 8, 10_000.0))
    angles = positions[..., None] * 10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    assert_same(y, torch.cat([turned.real, turned.imag, x[..., 8:]], -1), [x])


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_cross_entropy_in_chunks(chunk_size):
    hidden, weight = randn(20, 8), randn(30, 8, seed=1)
    labels = torch.randint(30, (20,), generator=torch.Generator().manual_seed(2))
    labels[::6] = -100
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert_same(
        linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size) * 0.3, expected * 0.3, [hidden, weight]
    )


def test_cross_entropy_without_gradients_and_in_bfloat16():
    hidden, weight = randn(20, 8).detach(), randn(30, 8, seed=1).detach()
    labels = torch.arange(20)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), expected)
    low, low_weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    loss = linear_cross_entropy(low, low_weight, labels)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    loss.backward()
    assert low.grad.dtype is low_weight.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_attention(window, kv_heads):
    """Against SDPA with a mask of the whole row."""
    bounds = [0, 0, 1, 3, 40, 41, 41, 70]
    q, k, v = randn(1, 70, 4, 8), randn(1, 70, kv_heads, 8, seed=1), randn(1, 70, kv_heads, 8, seed=2)
    ours = packed_attention(q, k, v, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), window=window)
    document = torch.bucketize(torch.arange(70), torch.tensor(bounds[1:]), right=True)
    distance = torch.arange(70)[:, None] - torch.arange(70)
    mask = (document[:, None] == document) & (distance >= 0) & (distance < (window or 70))
    repeated = [x.repeat_interleave(4 // x.shape[2], 2).transpose(1, 2) for x in (q, k, v)]
    assert_same(ours, F.scaled_dot_product_attention(*repeated, attn_mask=mask).transpose(1, 2), [q, k, v])


def test_sequence_of_packed_rows():
    sequence = SequenceLayout.of_packed_rows(torch.tensor([[0, 2, 5, 5], [0, 1, 2, 5]], dtype=torch.int32), 5)
    assert sequence.cu_seqlens.tolist() == [0, 2, 5, 5, 6, 7, 10]
    assert sequence.positions.tolist() == [[0, 1, 0, 1, 2, 0, 0, 0, 1, 2]]


def test_token_shift():
    """The token before, whole, packed and in pieces; a document's first token has none."""
    x = randn(2, 20, 6).detach()
    shift = TokenShift(6)
    expected = torch.cat([torch.zeros(2, 1, 6, dtype=torch.float64), x[:, :-1]], 1)
    assert torch.equal(shift(x, sequence=SequenceLayout.of_rows(2, 20)), expected)
    bounds = torch.tensor([[0, 7, 8, 20], [0, 20, 20, 20]], dtype=torch.int32)
    expected[0, [7, 8]] = 0
    packed = shift(x.view(1, 40, 6), sequence=SequenceLayout.of_packed_rows(bounds, 20))
    assert torch.equal(packed.view(2, 20, 6), expected)
    cache = shift.init_cache(1, torch.float64)
    pieces = [
        shift(x[1:, start:end], sequence=SequenceLayout(torch.arange(start, end)[None]), cache=cache)
        for start, end in [(0, 9), (9, 10), (10, 20)]
    ]
    assert torch.equal(torch.cat(pieces, 1), expected[1:])
