"""linear_recurrence: the chunked form equals the recurrence token by token, and so do its gradients."""

import pytest
import torch

from torchlmoe.ops.linear_recurrence import linear_recurrence

HEADS, KEY, VALUE, TOKENS = 4, 6, 5, 90  # a chunk has 64 tokens
DOCUMENTS = [0, 3, 3, 70, 90]
# Widths after [tokens, heads] of what a mixer may give beside q, k and v.
TERMS: dict[str, dict[str, tuple[int, ...]]] = {
    "nothing": {},
    "decay": {"log_decay": ()},
    "decay and delta rule": {"log_decay": (), "erase": ()},
    "decay per channel and delta rule": {"log_decay": (KEY,), "erase": (KEY,), "erase_key": (KEY,)},
    "decay on both sides": {"log_decay": (KEY,), "value_log_decay": (VALUE,)},
}


def given(widths: dict[str, tuple[int, ...]], length: int, documents: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = {"q": randn(1, length, 2, KEY), "k": randn(1, length, 2, KEY) * KEY**-0.5}
    tensors |= {"v": randn(1, length, HEADS, VALUE), "initial_state": randn(documents, HEADS, KEY, VALUE)}
    for name, width in widths.items():
        x = randn(1, length, HEADS, *width)
        tensors[name] = -x.abs() if "decay" in name else x.sigmoid() if name == "erase" else x * KEY**-0.5
    return {name: x.requires_grad_() for name, x in tensors.items()}


def run(tensors: dict[str, torch.Tensor], backend: str, cu_seqlens: torch.Tensor | None = None) -> list[torch.Tensor]:
    """o, the final state, and the gradients of all tensors."""
    results = linear_recurrence(**tensors, scale=0.5, output_final_state=True, backend=backend, cu_seqlens=cu_seqlens)
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in results)
    return [*results, *torch.autograd.grad(loss, list(tensors.values()))]


@pytest.mark.parametrize("widths", TERMS.values(), ids=TERMS)
def test_chunks_equal_the_definition(widths):
    """In packed documents, each of which is what it is alone."""
    tensors, bounds = given(widths, TOKENS, len(DOCUMENTS) - 1), torch.tensor(DOCUMENTS, dtype=torch.int32)
    found, expected = run(tensors, "chunked", bounds), run(tensors, "reference", bounds)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for document, (start, end) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
        part = {name: x[:, start:end] for name, x in tensors.items() if name != "initial_state"}
        state = tensors["initial_state"][document : document + 1]
        if start < end:
            alone = linear_recurrence(**part, initial_state=state, scale=0.5)[0]
            torch.testing.assert_close(found[0][:, start:end], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("widths", TERMS.values(), ids=TERMS)
def test_decoding_continues_from_the_state(widths):
    tensors = {name: x.detach() for name, x in given(widths, TOKENS, 1).items()}
    state, pieces = tensors.pop("initial_state"), []
    expected = linear_recurrence(**tensors, initial_state=state)[0]
    for start, end in [(0, 65), (65, 66), (66, 67), (67, 90)]:
        part = {name: x[:, start:end] for name, x in tensors.items()}
        o, state = linear_recurrence(**part, initial_state=state, output_final_state=True)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("widths", TERMS.values(), ids=TERMS)
def test_gradients_of_the_chunks(widths):
    tensors = given(widths, 3, 1)

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        return linear_recurrence(**named, output_final_state=True, backend="chunked")

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)
