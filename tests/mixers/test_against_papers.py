"""Mixers against their papers' formulas, written out token by token, as masked attention or convolution, in float64."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.s4 import hippo_frequencies


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
    low_rank = F.linear(F.linear(x, mixer.decay_down_proj.weight), mixer.decay_up_proj.weight)
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


@pytest.mark.parametrize("initialization", ["legs", "linear"])
def test_s4_is_a_convolution(initialization):
    """arXiv 2206.11893: the kernel of its equation 6 (zero-order hold), of the whole length, and the layer of S4."""
    mixer, x = MIXERS["s4"](32, state_dim=8, initialization=initialization, init_std=0.3).double(), inputs()
    with named_draws(mixer, seed=1):
        mixer.init_weights()
    space = mixer.state_space
    A = -space.A_log.exp() + 1j * space.frequency
    dt, C = space.log_step.exp()[:, None], torch.view_as_complex(space.C)
    powers = (A * dt)[..., None].exp() ** torch.arange(70)
    kernel = 2 * ((C * ((A * dt).exp() - 1) / A)[..., None] * powers).real.sum(1)
    o = torch.nn.functional.conv1d(F.pad(x.mT, (69, 0)), kernel.flip(-1)[:, None], groups=32).mT + mixer.D * x
    first, second = F.linear(F.gelu(o), mixer.o_proj.weight).chunk(2, -1)
    expected = first * torch.sigmoid(second)
    torch.testing.assert_close(mixer(x, sequence=Sequence.of_rows(2, 70)), expected, rtol=1e-9, atol=1e-11)


def test_hippo_frequencies():
    """arXiv 2111.00396, theorem 1: HiPPO-LegS (its equation 2) plus P P^T, P_n = sqrt(n + 1/2), is normal."""
    n = torch.arange(16, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    hippo = -((root[:, None] * root).tril(-1) + (n + 1).diag())
    normal_part = hippo + (n + 0.5).sqrt()[:, None] * (n + 0.5).sqrt()
    torch.testing.assert_close(normal_part @ normal_part.mT, normal_part.mT @ normal_part)
    eigenvalues = torch.linalg.eigvals(normal_part)
    torch.testing.assert_close(eigenvalues.real, torch.full_like(n, -0.5))
    expected = eigenvalues.imag[eigenvalues.imag > 0].sort().values
    torch.testing.assert_close(hippo_frequencies(16).double(), expected, rtol=1e-6, atol=1e-6)
