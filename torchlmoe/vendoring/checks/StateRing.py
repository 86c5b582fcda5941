"""StateRing: weights that learn as they read, on spans of a row, equal those on one process, forward and backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from torchlmoe.styles.recurrence import StateRing
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, assert_gradients_equal, on_ranks, span_of

MINI_BATCHES_OF = 3


class Learner(nn.Module):
    """Takes a gradient step of |tanh(W^T k) - v|^2 / 2 at every token, at the weights of its mini-batch's start."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        initial_state: Tensor,
        mini_batch_size: int,
        cu_seqlens: Tensor | None = None,
        offset: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """initial_state [N, heads, 2, K, V]: the weights at the start of the mini-batch, and now."""
        places = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        outputs, states = [], []
        for document, (start, end) in enumerate(zip(places, places[1:], strict=False)):
            at_start, now = initial_state[document].unbind(1)
            past = 0 if offset is None else int(offset[document])
            for t in range(start, end):
                if (t - start + past) % mini_batch_size == 0:
                    at_start = now
                said = (k[0, t][:, None] @ at_start).tanh()
                slope = (said - v[0, t][:, None]) * (1 - said.square())
                now = now - 0.3 * k[0, t][..., None] * slope
                outputs.append((q[0, t][:, None] @ now)[:, 0])
            states.append(torch.stack([at_start, now], 1))
        return torch.stack(outputs)[None], torch.stack(states)


def check_ring(mesh: DeviceMesh) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k, v, first = randn(1, 12, 2, 3), randn(1, 12, 2, 3), randn(1, 12, 2, 4), randn(5, 2, 1, 3, 4)
    for bounds in (None, [0, 12], [0, 1, 5, 5, 12], [0, 4, 6, 7, 8, 12]):
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        state = first[: 1 if bounds is None else len(bounds) - 1].expand(-1, -1, 2, -1, -1)
        options = dict(mini_batch_size=MINI_BATCHES_OF, cu_seqlens=cu_seqlens)
        whole = [x.detach().clone().requires_grad_() for x in (q, k, v, state)]
        expected = Learner()(*whole[:3], initial_state=whole[3], **options)[0]
        weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
        (expected * weight).sum().backward()
        module = parallelize_module(Learner(), mesh, StateRing())
        parts = [span_of(x, mesh) for x in whole[:3]] + [whole[3]]
        parts = [x.detach().clone().requires_grad_() for x in parts]
        o = module(*parts[:3], initial_state=parts[3], **options)[0]
        (o * span_of(weight, mesh)).sum().backward()
        torch.testing.assert_close(o, span_of(expected, mesh), rtol=1e-9, atol=1e-11)
        gradients = zip(parts, whole, (True, True, True, False), strict=True)
        assert_gradients_equal(mesh, ((part.grad, x.grad, of_tokens) for part, x, of_tokens in gradients))


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_ring_on_ranks(world_size):
    on_ranks(world_size, check_ring)
