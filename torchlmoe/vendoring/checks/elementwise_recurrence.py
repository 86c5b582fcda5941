"""elementwise_recurrence: the chunked form equals the recurrence token by token, and so do its gradients."""

import pytest
import torch

from torchlmoe.ops.elementwise_recurrence import elementwise_recurrence

# The rates are per token, or per channel times a step per token (Mamba), or constant (S4); the last ones are complex.
RATES = ("per token", "with a step", "constant", "constant and complex")
CUTS = [0, 3, 3, 280, 300]


def elements(rates: str, length: int, documents: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.complex128 if "complex" in rates else torch.float64

    def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    of_tokens = () if "constant" in rates else (1, length)
    tensors = {"q": randn(*of_tokens, 2, 3, dtype=dtype), "k": randn(*of_tokens, 2, 3, dtype=dtype)}
    tensors["v"] = randn(1, length, 2, 4)
    log_decay = -randn(*(of_tokens if rates == "per token" else ()), 2, 3, 4).abs() / 8
    tensors["log_decay"] = torch.complex(log_decay, randn(2, 3, 4)) if "complex" in rates else log_decay
    if rates == "with a step":
        tensors["step"] = randn(1, length, 2, 4).abs()
    tensors["initial_state"] = randn(documents, 2, 3, 4, dtype=dtype)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def outcome(
    tensors: dict[str, torch.Tensor], backend: str, cu_seqlens: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """o, the final state, and the gradients of all tensors."""
    o, state = elementwise_recurrence(**tensors, output_final_state=True, backend=backend, cu_seqlens=cu_seqlens)
    assert state is not None
    loss = (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum() + state.abs().square().sum()
    return [o, state, *torch.autograd.grad(loss, list(tensors.values()))]


@pytest.mark.parametrize("rates", RATES)
def test_scan_equals_the_definition(rates):
    """In packed documents, each of which is what it is alone."""
    tensors, bounds = elements(rates, CUTS[-1], len(CUTS) - 1), torch.tensor(CUTS, dtype=torch.int32)
    found, expected = outcome(tensors, "chunked", bounds), outcome(tensors, "reference", bounds)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for document, (start, end) in enumerate(zip(CUTS, CUTS[1:], strict=False)):
        if start == end:
            continue
        part = {name: x[:, start:end] if x.shape[:2] == (1, CUTS[-1]) else x for name, x in tensors.items()}
        part["initial_state"] = tensors["initial_state"][document : document + 1]
        torch.testing.assert_close(found[0][:, start:end], elementwise_recurrence(**part)[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rates", RATES)
def test_elementwise_decoding_continues_from_the_state(rates):
    tensors = {name: x.detach() for name, x in elements(rates, 40, 1).items()}
    state, pieces = tensors.pop("initial_state"), []
    expected = elementwise_recurrence(**tensors, initial_state=state)[0]
    for start, end in [(0, 33), (33, 34), (34, 35), (35, 40)]:
        part = {name: x[:, start:end] if x.shape[:2] == (1, 40) else x for name, x in tensors.items()}
        o, state = elementwise_recurrence(**part, initial_state=state, output_final_state=True)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rates", RATES)
def test_gradients_of_the_scan(rates):
    tensors = elements(rates, 3, 1)

    def function(*values: torch.Tensor) -> torch.Tensor:
        return elementwise_recurrence(**dict(zip(tensors, values, strict=True)), backend="chunked")[0]

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)
