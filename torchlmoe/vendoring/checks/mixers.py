"""Mixers: documents do not meet, decoding continues a prefill, and gradients are those of finite differences."""

import pytest
import torch

from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import Mixer

KINDS: list[type[Mixer]] = []
DIM, LENGTH, BOUNDS = 32, 100, [0, 1, 71, 71, 100]  # beyond a chunk of 64, and with an empty document


def build(kind: type[Mixer], backend: str = "auto") -> Mixer:
    """In float64, with no parameter zero: it would hide what it multiplies."""
    torch.manual_seed(0)
    wanted = {"num_heads": 4, "mini_batch_size": 4, "backend": backend, "init_std": 0.3}
    mixer = kind(DIM, **{name: value for name, value in wanted.items() if name in kind.settings()})  # type: ignore[call-arg]
    mixer.init_weights()
    with torch.no_grad():
        for parameter in mixer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return mixer.double()


def inputs(batch_size: int, length: int) -> torch.Tensor:
    return torch.randn(batch_size, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_meet(kind):
    """Each one's output is its output alone, in every backend, and gradients across documents are exactly zero."""
    packed = SequenceLayout.of_packed_rows(torch.tensor([BOUNDS], dtype=torch.int32), LENGTH, loss_weight=0.0)
    x = inputs(1, LENGTH).requires_grad_()
    for backend in ("auto", "reference") if "backend" in kind.settings() else ("auto",):
        mixer = build(kind, backend)
        y = mixer(x, sequence=packed)
        for start, end in zip(BOUNDS, BOUNDS[1:], strict=False):
            if start == end:
                continue
            alone = build(kind)(x[:, start:end], sequence=SequenceLayout.of_rows(1, end - start))
            torch.testing.assert_close(y[:, start:end], alone, rtol=1e-9, atol=1e-10)
            (gradient,) = torch.autograd.grad(y[:, start:end].square().sum(), x, retain_graph=True)
            assert gradient[:, start:end].any()
            assert not gradient[:, :start].any()
            assert not gradient[:, end:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_forward(kind):
    """Token by token, and in pieces between; a cache serves one document after another."""
    mixer, x, splits = build(kind), inputs(2, 75), [*range(8), 70, 71, 72, 75]
    with torch.no_grad():
        expected = mixer(x, sequence=SequenceLayout.of_rows(2, 75))
        cache = mixer.init_cache(2, 75, torch.float64)
        mixer(x.flip(0), sequence=SequenceLayout.of_rows(2, 75), cache=cache)
        pieces = []
        for start, end in zip(splits, splits[1:], strict=False):
            sequence = SequenceLayout(torch.arange(start, end).expand(2, -1))
            pieces.append(mixer(x[:, start:end], sequence=sequence, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    """Of the input and every parameter, each along a random direction."""
    mixer, sequence = build(kind), SequenceLayout.of_rows(1, 75, loss_weight=0.0)
    x, weight = inputs(1, 75).requires_grad_(), inputs(1, 75).flip(1)

    def loss() -> torch.Tensor:
        return (mixer(x, sequence=sequence) * weight).sum()

    leaves = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(loss(), list(leaves.values()))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction, before = torch.randn_like(leaf), leaf.detach().clone()
        moved = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                leaf.copy_(before + step * direction)
                moved.append(loss())
                leaf.copy_(before)
        found, expected = (gradient * direction).sum(), (moved[0] - moved[1]) / 2e-6
        assert gradient.any(), name
        assert (found - expected).abs() <= 1e-6 + 1e-5 * expected.abs(), name
