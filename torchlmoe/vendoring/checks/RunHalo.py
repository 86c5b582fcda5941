"""RunHalo: convolutions over the tokens of each memory of a document, on spans of a row, equal those on one process."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from torchlmoe.styles.run_halo import RunHalo
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, assert_gradients_equal, on_ranks, span_of

NUM_MEMORIES = 2


@dataclass(frozen=True)
class Runs:
    """Bounds: cu_seqlens, int32 [N * memories + 1], of the span's runs; document_bounds, [N + 1], of the whole row."""

    cu_seqlens: Tensor
    document_bounds: Tensor


@dataclass(frozen=True)
class WithMemories:
    memories: Runs


class RunConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64, generator=generator))  # [channels, width]

    def forward(self, x: Tensor, *, sequence: WithMemories, cache: None = None) -> Tensor:
        bounds = sequence.memories.cu_seqlens
        return self.continue_runs(x, bounds, x.new_zeros(len(bounds) - 1, 3, x.shape[2]))[0]

    def continue_runs(self, x: Tensor, bounds: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """x [1, M, channels]; earlier [runs, 3, channels], what each run has seen: y, and what it has seen then."""
        outputs, last = [x[0, :0]], []
        for start, end, before in zip(bounds.tolist(), bounds.tolist()[1:], earlier, strict=False):
            extended = torch.cat([before, x[0, start:end]])
            last.append(extended[-3:])
            if start < end:
                outputs.append((extended.unfold(0, 4, 1) * self.weight).sum(-1))
        return torch.cat(outputs)[None], torch.stack(last)


def packed(bounds: Tensor, memory: Tensor, first: int) -> tuple[Tensor, Runs]:
    """The order in which tokens, from the row's token `first` on, come by document and memory; and its runs."""
    document = torch.bucketize(first + torch.arange(len(memory)), bounds[1:], right=True)
    run = document * NUM_MEMORIES + memory
    counts = run.bincount(minlength=(len(bounds) - 1) * NUM_MEMORIES)
    return run.argsort(stable=True), Runs(torch.cat([counts[:1] * 0, counts.cumsum(0)]).int(), bounds)


def check_runs(mesh: DeviceMesh) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 1, 24, 3, dtype=torch.float64, generator=generator)
    memory = torch.randint(NUM_MEMORIES, (24,), generator=generator)
    for bounds in ([0, 24], [0, 1, 9, 9, 24], [0, 8, 12, 13, 16, 24]):
        results = []
        for split in (False, True):
            module: nn.Module = RunConvolution()
            given, chosen, grad, first = x, memory, weight, 0
            if split:
                module = parallelize_module(module, mesh, RunHalo())
                given, chosen, grad = (span_of(t, mesh) for t in (x, memory[None], weight))
                first, chosen = mesh.get_local_rank() * chosen.shape[1], chosen[0]
            given = given.detach().clone().requires_grad_()
            order, runs = packed(torch.tensor(bounds, dtype=torch.int32), chosen, first)
            y = module(given[:, order], sequence=WithMemories(runs))[:, order.argsort()]
            results.append((y, *torch.autograd.grad((y * grad).sum(), [given, *module.parameters()])))
        expected, found = results
        torch.testing.assert_close(found[0], span_of(expected[0], mesh), rtol=1e-9, atol=1e-11)
        assert_gradients_equal(mesh, zip(found[1:], expected[1:], (True, False), strict=True))


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_runs_on_ranks(world_size):
    on_ranks(world_size, check_runs)
