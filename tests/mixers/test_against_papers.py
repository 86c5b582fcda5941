"""Mixers against their papers' formulas, written out token by token or as masked attention, in float64."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers import MIXERS


def build(name, **options):
    mixer = MIXERS[name](32, num_heads=4, init_std=0.3, **options).double()
    with named_draws(mixer, seed=1):
        mixer.init_weights()
    return mixer


def inputs():
    return torch.randn(2, 70, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_gla_token_loop():
    """arXiv 2312.06635, equations 3 and 4, and the layer of its section 4.4."""
    mixer, x = build("gla"), inputs()
    with torch.no_grad():
        mixer.decay.bias.uniform_(-1, 1)
    q, k, v, gate = (
        F.linear(x, p.weight).view(2, 70, 4, -1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj)
    )
    low_rank = F.linear(F.linear(x, mixer.decay_proj.down_proj.weight), mixer.decay_proj.up_proj.weight)
    alpha = torch.sigmoid(low_rank + mixer.decay.bias).pow(1 / 16).view(2, 70, 4, -1)
    state = torch.zeros(2, 4, k.shape[-1], v.shape[-1], dtype=torch.float64)
    outputs = []
    for t in range(70):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] / k.shape[-1] ** 0.5, state))
    o = rms(torch.stack(outputs, 1)) * gate * torch.sigmoid(gate)
    expected = F.linear(o.flatten(2), mixer.o_proj.weight)
    torch.testing.assert_close(mixer(x, sequence=Sequence.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("feature_map", "normalizer"),
    [(name, False) for name in ("identity", "elu", "relu", "silu", "softmax")]
    + [(name, True) for name in ("elu", "relu", "softmax")],
)
def test_bla_masked_attention(feature_map, normalizer):
    """arXiv 2006.16236, equation 9 (with the normaliser), as the masked product of q and k."""
    mixer, x = build("bla", feature_map=feature_map, normalizer=normalizer), inputs()
    phi = {
        "identity": lambda z: z,
        "elu": lambda z: torch.where(z > 0, z + 1, z.exp()),
        "relu": lambda z: z.clamp_min(0),
        "silu": lambda z: z * torch.sigmoid(z),
        "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
    }[feature_map]
    q, k, v = (
        F.linear(x, p.weight).view(2, 70, 4, 8).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    weights = (phi(q) @ phi(k).mT).tril() * 8**-0.5
    o = weights @ v
    if normalizer:
        o = o / (weights.sum(-1, keepdim=True) + 1e-6)
    expected = F.linear(rms(o).transpose(1, 2).flatten(2), mixer.o_proj.weight)
    torch.testing.assert_close(mixer(x, sequence=Sequence.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


def heads(x, *projections):
    """x [2, 70, 32] -> a [2, 4, 70, width] for each projection."""
    return [F.linear(x, projection.weight).view(2, 70, 4, -1).transpose(1, 2) for projection in projections]


def assert_output(mixer, x, o, gate=None):
    """o [2, 4, 70, V], normalised as the paper has it, through the output gate and projection, equals the mixer's."""
    if gate is not None:
        o = o * gate * torch.sigmoid(gate)
    expected = F.linear(o.transpose(1, 2).flatten(2), mixer.o_proj.weight)
    torch.testing.assert_close(mixer(x, sequence=Sequence.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


def test_retention_masked_attention():
    """arXiv 2307.08621, equations 5 and 8: complex rotation, causal decay, norm per head, swish gate."""
    mixer, x = build("retention"), inputs()
    q, k, v, gate = heads(x, mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj)
    angle = torch.arange(70)[:, None] * 10_000 ** -(torch.arange(4, dtype=torch.float64) / 4)
    q, k = (torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle) for x in (q, k))
    distance = (torch.arange(70)[:, None] - torch.arange(70)).double()
    gamma = 1 - 2 ** -(5 + torch.arange(4, dtype=torch.float64))
    weights = (q @ k.mH).real * 8**-0.5 * (gamma[:, None, None] ** distance).tril()
    assert_output(mixer, x, rms(weights @ v), gate)


def test_gateloop_token_loop():
    """arXiv 2311.01927, equations 4 to 6: a complex state, whose transition has magnitude and phase of the input."""
    mixer, x = build("gateloop", expand_v=1.5), inputs()
    with torch.no_grad():
        mixer.decay.bias.uniform_(-1, 1)
    q, k, v, gate, phase = heads(x, mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj, mixer.phase_proj)
    magnitude = torch.sigmoid(F.linear(x, mixer.decay_proj.weight, mixer.decay.bias)).view(2, 70, 4, 4).transpose(1, 2)
    q, k = (torch.complex(x[..., :4], x[..., 4:]) for x in (q, k))
    transition = torch.polar(magnitude, phase)
    state = torch.zeros(2, 4, 4, 12, dtype=torch.complex128)
    outputs = []
    for t in range(70):
        state = transition[:, :, t, :, None] * state + k[:, :, t, :, None].conj() * v[:, :, t, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state).real * 8**-0.5)
    assert_output(mixer, x, rms(torch.stack(outputs, 2)), gate)


def test_based_taylor_attention():
    """arXiv 2402.18668, section 4.1: weights 1 + z + z^2 / 2, normalised."""
    mixer, x = build("based", feature_dim=6), inputs()
    q, k, v = heads(x, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    z = q @ k.mT / 6**0.5
    weights = (1 + z + z.square() / 2).tril()
    assert_output(mixer, x, weights @ v / (weights.sum(-1, keepdim=True) + 1e-6))


def test_rebased_quadratic_attention():
    """arXiv 2402.10644, equation 4: the square of the product of normalised, scaled and shifted q and k, normalised."""
    mixer, x = build("rebased", feature_dim=6), inputs()
    with torch.no_grad():
        mixer.feature_norm.weight.uniform_(0.5, 1.5)
        mixer.feature_norm.bias.uniform_(-1, 1)
    q, k, v = heads(x, mixer.q_proj, mixer.k_proj, mixer.v_proj)

    def phi(x):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * mixer.feature_norm.weight + mixer.feature_norm.bias

    weights = ((phi(q) @ phi(k).mT).square() / 6).tril()
    assert_output(mixer, x, weights @ v / (weights.sum(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_deltanet_token_loop(negative_eigenvalues):
    """arXiv 2406.06484, equation 2 and the layer of its section 3.4."""
    mixer, x = build("deltanet", expand_v=1.5, negative_eigenvalues=negative_eigenvalues), inputs()

    def convolved(projection, convolution):
        padded = F.pad(F.linear(x, projection.weight).mT, (3, 0))
        y = F.conv1d(padded, convolution.weight[:, None], groups=padded.shape[1]).mT
        return (y * torch.sigmoid(y)).view(2, 70, 4, -1).transpose(1, 2)

    q, k, v = (convolved(getattr(mixer, f"{name}_proj"), getattr(mixer, f"{name}_conv")) for name in ("q", "k", "v"))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = torch.sigmoid(heads(x, mixer.b_proj)[0]) * (2 if negative_eigenvalues else 1)
    state = torch.zeros(2, 4, 8, 12, dtype=torch.float64)
    outputs = []
    for t in range(70):
        k_t, old = k[:, :, t], torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
        new = beta[:, :, t] * v[:, :, t] + (1 - beta[:, :, t]) * old
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, new - old)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t] / 8**0.5, state))
    assert_output(mixer, x, rms(torch.stack(outputs, 2)))
