"""GLA and BLA against their papers' formulas, written out token by token or as masked attention, in float64."""

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
