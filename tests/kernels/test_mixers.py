"""Mixers whose recurrence, convolution, norm and gate are kernels, against the same mixers in plain PyTorch."""

import pytest
import torch

from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS

ELEMENTWISE = {"mamba": dict(state_dim=2), "s4": dict(state_dim=4), "gfw": dict(num_heads=2, gate="full")}
BOUNDS = torch.tensor([[0, 5, 12], [0, 12, 12]], dtype=torch.int32)


def results(mixer, device):
    """Output and gradients of two packed rows, then an output in two pieces with a cache."""
    mixer.to(device).zero_grad()
    x = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    y = mixer(x, sequence=SequenceLayout.of_packed_rows(BOUNDS.to(device), 12))
    y.square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad, **{name: p.grad.clone() for name, p in mixer.named_parameters()}}
    with torch.no_grad():
        cache = mixer.init_cache(1, 24, torch.float32, device)
        for name, part in zip(("prefill", "decode"), x.split([23, 1], 1), strict=True):
            found[name] = mixer(part, sequence=SequenceLayout.of_rows(1, part.shape[1], device), cache=cache)
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_mixers(name, device, monkeypatch):
    mixers = {}
    for backend in ("chunked", "triton"):
        mixers[backend] = MIXERS[name](8, backend=backend, **ELEMENTWISE[name])
        mixers[backend].init_weights()
    mixers["triton"].load_state_dict(mixers["chunked"].state_dict())
    expected = results(mixers["chunked"], torch.device("cpu"))
    for place in ("ops.causal_conv", "layers.norms", "layers.decay_gate"):
        monkeypatch.setattr(f"torchlmoe.{place}.kernels_serve", lambda *_: True)
    found = results(mixers["triton"], device)
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-9, key
