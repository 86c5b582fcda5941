"""Mixers on kernels whose sequence is split over gloo ranks equal one process in plain PyTorch."""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module

from tests.conftest import run_on_ranks
from tests.parallel.test_sequence_parallel import LENGTH, mesh_and_cut, mixer_outcome
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS

DIM = 8
CASES = {
    "gla": dict(num_heads=1),
    "gated_deltanet": dict(num_heads=1),
    "mamba": dict(state_dim=2),
    "gfw": dict(num_heads=2, gate="full"),
}


def build(name, backend):
    torch.manual_seed(0)
    mixer = MIXERS[name](DIM, backend=backend, **CASES[name])
    mixer.init_weights()
    return mixer


def every_mixer():
    mesh, cut = mesh_and_cut()
    x, grad = torch.randn(2, 1, LENGTH, DIM, generator=torch.Generator().manual_seed(0))
    whole = SequenceLayout.of_packed_rows(
        torch.tensor([[0, 5, 40, LENGTH]], dtype=torch.int32), LENGTH, loss_weight=0.0
    )
    span = replace(whole, positions=cut("v", whole.positions), start=mesh.get_local_rank() * LENGTH // mesh.size())
    expected = {name: mixer_outcome(build(name, "chunked"), x, grad, whole) for name in CASES}
    for name in ("elementwise_recurrence", "linear_recurrence"):
        vars(sys.modules[f"torchlmoe.ops.{name}"])["_forward"] = None  # from here on only kernels run
    for name in CASES:
        mixer = build(name, "triton")
        parallelize_module(mixer, mesh, mixer.context_parallel_plan(lsm="all_gather", attention="all_gather"))
        y, grad_x, *gradients = mixer_outcome(mixer, cut("q", x), cut("q", grad), span)
        gradients = [gradient.contiguous() for gradient in gradients]
        for gradient in gradients:
            dist.all_reduce(gradient)
        wanted = [cut("q", expected[name][0]), cut("q", expected[name][1]), *expected[name][2:]]
        for ours, theirs in zip([y, grad_x, *gradients], wanted, strict=True):
            error = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-3)).item()
            assert error <= 1e-4, (name, error)


def test_mixers_equal_one_process(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # ranks are processes on the CPU, also where there is a GPU
    run_on_ranks(2, every_mixer)
