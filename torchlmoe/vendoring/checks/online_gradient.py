"""online_gradient: mini-batches equal the definition token by token, and so do their gradients."""

import pytest
import torch

from torchlmoe.ops.online_gradient import online_gradient

INNER = {"plain": (), "step scale": ("step_scale",), "decay and momentum": ("log_decay", "log_momentum")}
MINI_BATCH, PLACES = 4, [0, 3, 3, 30, 41]


def inner_tensors(extra: tuple[str, ...], length: int, documents: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = {name: randn(1, length, 2, 3) for name in ("q", "k", "v")}
    tensors |= {"learning_rate": randn(1, length, 2).sigmoid() / 4, "norm_weight": 1 + randn(2, 3) / 8}
    tensors["norm_bias"] = randn(2, 3)
    if "step_scale" in extra:
        tensors["step_scale"] = randn(2, MINI_BATCH).sigmoid()
    tensors |= {name: -randn(1, length, 2).abs() / 8 for name in extra if name != "step_scale"}
    state = randn(documents, 2, 1, 3, 3) / 4  # a mini-batch starts, so the weights are those that it starts with
    state = torch.cat([state, state, *([randn(*state.shape) / 8] if "log_momentum" in extra else [])], 2)
    return {name: x.requires_grad_() for name, x in (tensors | {"initial_state": state}).items()}


def descend(tensors: dict[str, torch.Tensor], backend: str, cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """o, the final state, and the gradients of all tensors."""
    results = online_gradient(
        **tensors, mini_batch_size=MINI_BATCH, output_final_state=True, backend=backend, cu_seqlens=cu_seqlens
    )
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in results)
    return [*results, *torch.autograd.grad(loss, list(tensors.values()))]


@pytest.mark.parametrize("extra", INNER.values(), ids=INNER)
def test_mini_batches_equal_the_definition(extra):
    """In packed documents, each of which is what it is alone."""
    tensors = inner_tensors(extra, PLACES[-1], len(PLACES) - 1)
    bounds = torch.tensor(PLACES, dtype=torch.int32)
    found = descend(tensors, "chunked", bounds)
    torch.testing.assert_close(found, descend(tensors, "reference", bounds), rtol=1e-9, atol=1e-10)
    for document, (start, end) in enumerate(zip(PLACES, PLACES[1:], strict=False)):
        if start < end:
            part = {name: x[:, start:end] if x.shape[:2] == (1, PLACES[-1]) else x for name, x in tensors.items()}
            part["initial_state"] = tensors["initial_state"][document : document + 1]
            alone = online_gradient(**part, mini_batch_size=MINI_BATCH)[0]
            torch.testing.assert_close(found[0][:, start:end], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("extra", INNER.values(), ids=INNER)
def test_decoding_continues_within_a_mini_batch(extra):
    tensors = {name: x.detach() for name, x in inner_tensors(extra, 20, 1).items()}
    state, pieces = tensors.pop("initial_state"), []
    expected = online_gradient(**tensors, initial_state=state, mini_batch_size=MINI_BATCH)[0]
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 9), (9, 20)]:
        part = {name: x[:, start:end] if x.shape[:2] == (1, 20) else x for name, x in tensors.items()}
        offset = torch.tensor([start % MINI_BATCH])
        o, state = online_gradient(
            **part, initial_state=state, offset=offset, output_final_state=True, mini_batch_size=MINI_BATCH
        )
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("extra", INNER.values(), ids=INNER)
def test_gradients_of_the_descent(extra):
    tensors = inner_tensors(extra, 6, 1)
    leaves = {name: x for name, x in tensors.items() if name != "initial_state"}

    def function(*values: torch.Tensor) -> torch.Tensor:
        state = tensors["initial_state"].detach()
        named = dict(zip(leaves, values, strict=True))
        return online_gradient(**named, initial_state=state, mini_batch_size=MINI_BATCH, backend="chunked")[0]

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
