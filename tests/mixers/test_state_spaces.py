"""S4 against the convolution that its paper makes of it; Mamba against transformers, weights converted; in float64."""

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from torchlmoe.interop import convert
from torchlmoe.interop.mamba import mamba_rules
from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.s4 import hippo_frequencies

LENGTH = 100


def drawn(name, **options):
    mixer = MIXERS[name](32, init_std=0.3, **options).double()
    with named_draws(mixer, seed=1):
        mixer.init_weights()
    return mixer


def inputs():
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_()


@pytest.mark.parametrize("initialization", ["legs", "linear"])
def test_s4_is_a_convolution(initialization):
    """arXiv 2206.11893: the kernel of its equation 6 (zero-order hold), of the whole length, and the layer of S4."""
    mixer, x = drawn("s4", state_dim=8, initialization=initialization), inputs()
    space = mixer.state_space
    A = (-space.A_log.exp() + 1j * space.frequency).view(32, 4)
    dt, C = space.log_step.exp()[:, None], torch.view_as_complex(space.C.view(32, 4, 2))
    powers = (A * dt)[..., None].exp() ** torch.arange(LENGTH)
    kernel = 2 * ((C * ((A * dt).exp() - 1) / A)[..., None] * powers).real.sum(1)
    o = F.conv1d(F.pad(x.mT, (LENGTH - 1, 0)), kernel.flip(-1)[:, None], groups=32).mT + mixer.D * x
    first, second = F.linear(F.gelu(o), mixer.o_proj.weight).chunk(2, -1)
    expected = first * torch.sigmoid(second)
    torch.testing.assert_close(mixer(x, sequence=SequenceLayout.of_rows(2, LENGTH)), expected, rtol=1e-9, atol=1e-11)


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


def test_mamba():
    config = MambaConfig(hidden_size=32, state_size=8, expand=2, conv_kernel=4, time_step_rank=5)
    theirs = MambaMixer(config, layer_idx=0).double()
    ours, x = drawn("mamba", state_dim=8, step_rank=5), inputs()
    with torch.no_grad():
        ours.D.uniform_(-1, 1)
    table = mamba_rules(channels=64, state_dim=8, conv_size=4)
    theirs.load_state_dict(convert(ours.state_dict(), table, reverse=True))
    y, expected = ours(x, sequence=SequenceLayout.of_rows(2, LENGTH)), theirs(x)
    gradients = [torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected)]
    # Theirs goes through float32 in the recurrence even in float64: so near is as near as it gets.
    for found, wanted, tolerance in ((y, expected, 1e-6), (*gradients, 3e-6)):
        assert (found - wanted).norm() <= tolerance * wanted.norm()
