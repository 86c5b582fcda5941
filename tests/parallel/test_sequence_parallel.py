"""Recurrences and mixers whose sequence is split over gloo ranks equal one process: outputs and every gradient."""

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks.sequence_parallel import cases as styles
from benchmarks.sequence_parallel import count
from tests.conftest import run_on_ranks
from tests.mixers.test_every_mixer import CASES, DIM, MIXTURES, build
from torchlmoe.layers.elementwise_recurrence import ElementwiseRecurrence
from torchlmoe.layers.online_gradient import OnlineGradient
from torchlmoe.layers.recurrence import LinearRecurrence
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.styles import recurrence as sequence
from torchlmoe.styles.recurrence import LSMSequenceParallel

LENGTH, HEADS, KEY, VALUE = 48, 4, 5, 6
# Spans of 2, 3 and 4 ranks begin at 24; 16, 32; 12, 24, 36.
ROWS = {
    "one document": [0, 48],
    "straddling": [0, 5, 40, 48],
    "at borders": [0, 12, 16, 24, 36, 48],
    "just off borders": [0, 11, 13, 23, 25, 31, 33, 35, 37, 48],
    "empty ones": [0, 0, 12, 12, 24, 24, 24, 47, 48, 48],
    "not packed": None,
}
PER_TOKEN, PER_HEAD = ("B", "T", HEADS), (HEADS,)
TERMS = {
    "none": {},
    "head": {"log_decay": PER_HEAD},
    "scalar": {"log_decay": PER_TOKEN},
    "channel": {"log_decay": (*PER_TOKEN, KEY)},
    "value": {"value_log_decay": (*PER_TOKEN, VALUE)},
    "both sides": {"log_decay": PER_TOKEN, "value_log_decay": (*PER_TOKEN, VALUE)},
    "bonus": {"bonus": (HEADS, KEY)},
    "channel, bonus": {"log_decay": (*PER_TOKEN, KEY), "bonus": (HEADS, KEY)},
    "delta": {"erase": PER_TOKEN},
    "gated delta": {"log_decay": PER_TOKEN, "erase": PER_TOKEN},
    "channel, delta": {"log_decay": (*PER_TOKEN, KEY), "erase": PER_TOKEN},
    "vector erase": {"log_decay": PER_TOKEN, "erase": (*PER_TOKEN, KEY)},
    "own erase key": {"log_decay": (*PER_TOKEN, KEY), "erase": PER_TOKEN, "erase_key": (*PER_TOKEN, KEY)},
}
ELEMENTWISE = {
    "full": {"log_decay": (*PER_TOKEN, KEY, VALUE)},
    "step": {"log_decay": (HEADS, KEY, VALUE), "step": (*PER_TOKEN, VALUE)},
    "constant": {"log_decay": (HEADS, KEY, VALUE)},
    "complex": {"log_decay": (HEADS, KEY, VALUE)},
}
ONLINE = {
    "plain": {},
    "decay": {"log_decay": PER_TOKEN},
    "momentum": {"log_decay": PER_TOKEN, "log_momentum": PER_TOKEN},
    "scaled steps": {"step_scale": (HEADS, 4)},
}


def draw(name, shape, rows, generator, dtype):
    """Gates of 0, -30 and -1e4 among ordinary ones."""
    shape = [{"B": rows, "T": LENGTH}.get(size, size) for size in shape]
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    if name.endswith(("log_decay", "log_momentum")):
        x = F.logsigmoid(2 * x)
        x.view(-1)[::17], x.view(-1)[::31], x.view(-1)[::47] = 0, -30, -1e4
    elif name in ("erase", "step", "step_scale", "learning_rate"):
        x = x.sigmoid() if x.shape[-1] != KEY else 0.3 * x
    elif name in ("k", "erase_key"):
        x = F.normalize(x, dim=-1)
    return x.to(dtype)


def cases(dtype, backend="auto", wanted=lambda kind, name, row_name: True):
    """Modules, and their arguments for the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    for row_name, bounds in ROWS.items():
        rows, cu_seqlens = (1, torch.tensor(bounds, dtype=torch.int32)) if bounds else (2, None)
        shared = {"q": ("B", "T", 2, KEY), "k": ("B", "T", 2, KEY), "v": (*PER_TOKEN, VALUE)}
        whole = {"q": (*PER_TOKEN, KEY), "k": (*PER_TOKEN, KEY), "v": (*PER_TOKEN, VALUE)}
        rates = {"learning_rate": PER_TOKEN, "norm_weight": (HEADS, VALUE), "norm_bias": (HEADS, VALUE)}
        kinds = (
            (LinearRecurrence, TERMS, shared),
            (ElementwiseRecurrence, ELEMENTWISE, whole),
            (OnlineGradient, ONLINE, whole | rates),
        )
        for kind, table, base in kinds:
            for name, terms in table.items():
                tensors = {key: draw(key, shape, rows, generator, dtype) for key, shape in (base | terms).items()}
                for key in ("q", "k", "log_decay") if name == "complex" else ():
                    imaginary = torch.randn(tensors[key].shape, dtype=dtype, generator=generator)
                    tensors[key] = torch.complex(tensors[key], imaginary)
                options = {"cu_seqlens": cu_seqlens}
                if kind is OnlineGradient:
                    documents = rows if cu_seqlens is None else len(cu_seqlens) - 1
                    parts = 3 if "log_momentum" in terms else 2
                    state = 0.3 * torch.randn(HEADS, parts, KEY, VALUE, dtype=dtype, generator=generator)
                    tensors["initial_state"] = state.expand(documents, -1, -1, -1, -1).clone()
                    tensors["initial_state"][:, :, 0] = tensors["initial_state"][:, :, 1]
                    options["mini_batch_size"] = 4
                if name in ("scalar", "gated delta"):
                    options["scale"] = 0.5
                if wanted(kind.__name__, name, row_name):
                    yield (kind.__name__, name, row_name), kind(backend), tensors, options


def splits(name, x):
    """Whether a term is one for each token."""
    return name in ("q", "k", "v", "learning_rate") or (x.dim() > 2 and x.shape[1] == LENGTH)


def outcome(module, tensors, options, cut=lambda name, x: x):
    """o and the gradients of sum(o * cotangent); what is not split is summed over ranks."""
    leaves = {name: cut(name, x).clone().requires_grad_() for name, x in tensors.items()}
    o, _ = module(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(*tensors["v"].shape, dtype=torch.float64, generator=generator).to(o.dtype)
    grads = torch.autograd.grad((o * cut("v", whole)).sum(), list(leaves.values()))
    return {"o": o.detach(), **dict(zip(leaves, grads, strict=True))}


def mesh_and_cut():
    """The mesh of all ranks, and what takes this rank's span of a term."""
    start_process_group(torch.device("cpu"))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    span = slice(rank * LENGTH // ranks, (rank + 1) * LENGTH // ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    return mesh, lambda name, x: x[:, span] if splits(name, x) else x


def assert_ranks_equal_one(communication, dtype, tolerance, erase_tolerance=None, **which):
    mesh, cut = mesh_and_cut()

    for case, module, tensors, options in cases(dtype, **which):
        expected = outcome(module, tensors, options)
        style = module.context_parallel_style(communication, "all_gather")
        if case[2] == "straddling" and case[0] == "LinearRecurrence":  # without an operation for it
            style.span_summary = None
        found = outcome(parallelize_module(module, mesh, style), tensors, options, cut)
        for name, value in found.items():
            if name == "o" or splits(name, tensors[name]):
                reference = cut("v" if name == "o" else name, expected[name])
            else:
                value = value.contiguous()
                dist.all_reduce(torch.view_as_real(value) if value.is_complex() else value)
                reference = expected[name]
            scale = max(expected[name].norm(), 1e-3)  # of the whole: a span may have next to nothing
            error = (value - reference).norm() / scale
            dist.all_reduce(error, dist.ReduceOp.MAX)  # so that all ranks continue or all stop
            allowed = erase_tolerance if erase_tolerance and "erase" in tensors else tolerance
            assert error <= allowed, (case, name, error)


def every_recurrence():
    for communication in ("all_gather", "ring"):
        assert_ranks_equal_one(communication, torch.float64, 1e-9)
        if dist.get_world_size() == 3:
            assert_ranks_equal_one(communication, torch.float32, 1e-5, 1e-4)


OTHER_DEGREES = [pytest.param(degree, marks=pytest.mark.long) for degree in (2, 4)]


@pytest.mark.parametrize("world_size", [3, *OTHER_DEGREES])
def test_recurrences_equal_one_process(world_size):
    run_on_ranks(world_size, every_recurrence)


def mixer_outcome(mixer, x, grad, sequence):
    x = x.clone().requires_grad_()
    y = mixer(x, sequence=sequence)
    return [y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], grad)]


def every_mixer():
    mesh, cut = mesh_and_cut()
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 1, LENGTH, DIM, dtype=torch.float64, generator=generator)
    for bounds in ([0, 5, 40, 48], [0, 12, 12, 16, 20, 48]):
        whole = SequenceLayout.of_packed_rows(torch.tensor([bounds], dtype=torch.int32), LENGTH, loss_weight=0.0)
        start = mesh.get_local_rank() * LENGTH // mesh.size()
        span = replace(whole, positions=cut("v", whole.positions), start=start)
        for case in CASES | MIXTURES if mesh.size() == 3 else CASES:
            choices = {"lsm": "all_gather", "attention": "all_gather"}
            if bounds[2] == 12:  # four heads cannot be spread over three ranks
                choices = {"lsm": "ring", "attention": "all_gather" if mesh.size() == 3 else "ulysses"}
            mixer = build(case)
            y, grad_x, *gradients = mixer_outcome(mixer, x, grad, whole)
            parallelize_module(mixer, mesh, mixer.context_parallel_plan(**choices))
            own_y, own_grad_x, *own = mixer_outcome(mixer, cut("q", x), cut("q", grad), span)
            own = [gradient.contiguous() for gradient in own]
            for gradient in own:
                dist.all_reduce(gradient)
            found, expected = [own_y, own_grad_x, *own], [cut("q", y), cut("q", grad_x), *gradients]
            names = ["y", "x", *(name for name, _ in mixer.named_parameters())]
            for name, ours, theirs in zip(names, found, expected, strict=True):
                error = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-3)).item()
                assert error <= 1e-9, (case, name, bounds, error)


@pytest.mark.parametrize("world_size", [3, *OTHER_DEGREES])
def test_mixers_equal_one_process(world_size):
    """Every one by its plan: outputs, and gradients of input and parameters."""
    run_on_ranks(world_size, every_mixer)


def count_collectives():
    mesh, cut = mesh_and_cut()
    for case, module, tensors, options in cases(torch.float64):
        if case[0] == "OnlineGradient":
            continue
        parallelize_module(module, mesh, module.context_parallel_style("all_gather", "all_gather"))
        leaves = {name: cut(name, x).clone().requires_grad_() for name, x in tensors.items()}
        with CommDebugMode() as forward:
            o, _ = module(**leaves, **options)
        with CommDebugMode() as backward:
            o.sum().backward()
        assert {str(key): count for key, count in forward.get_comm_counts().items()} == {
            "c10d_functional.all_gather_into_tensor": 1
        }, case
        assert {str(key): count for key, count in backward.get_comm_counts().items()} == {
            "c10d_functional.reduce_scatter_tensor": 1
        }, case


def test_one_collective_each_way():
    run_on_ranks(2, count_collectives)


def count_bytes():
    rows = count(4, (4096, 2**20))
    assert len(rows) == 2 * len(styles())
    for row in rows:
        assert row["forward KiB"] == row["backward KiB"] == row["formula KiB"], row
        assert row["calls"] == ("2 + 2" if "ulysses" in row["style"] else "1 + 1"), row
    for short, long in zip(rows[::2], rows[1::2], strict=True):
        grows = 256 if "attention" in short["style"] else 1
        assert long["forward KiB"] == grows * short["forward KiB"], short


def test_bytes_do_not_grow_with_the_sequence():
    """And are those of the formula."""
    run_on_ranks(1, count_bytes)


# What the reference code of the paper gets wrong, as changes to ours: (object, attribute, its replacement).
def own_span_dropped(o, q, *others, **terms):
    return add_reading(torch.zeros_like(o), q, *others, **terms)


def future_leaked(self, mesh, span, factors, state, travelling):
    return travelling[..., -state[0, 0].numel() :].sum(0).view_as(state)


def decay_ignored(self, factors, state):
    return state


def documents_ignored(cls, bounds, rank, num_ranks, length, runs=None):
    span = of_documents(bounds, rank, num_ranks, length, runs)
    ones = torch.ones_like(span.whole_P)
    return replace(span, whole_P=ones, continued_P=ones)


add_reading, of_documents = sequence._add_reading, sequence.Span.of_documents
MISTAKES = [
    (sequence, "_add_reading", own_span_dropped),
    (LSMSequenceParallel, "receive", future_leaked),
    (LSMSequenceParallel, "advance", decay_ignored),
    (sequence.Span, "of_documents", classmethod(documents_ignored)),
]


def make_mistakes():
    for owner, name, mistake in MISTAKES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, mistake)
            for communication in ("all_gather", "ring")[: 1 if mistake is future_leaked else 2]:
                with pytest.raises(AssertionError):
                    assert_ranks_equal_one(communication, torch.float64, 1e-9)


def test_the_comparison_sees_mistakes():
    run_on_ranks(3, make_mistakes)


class TokenLoop(nn.Module):
    """The recurrence with a decay per head and token and the delta rule, by someone else."""

    def forward(self, q, k, v, *, log_decay, erase, initial_state=None, output_final_state=False, cu_seqlens=None):
        bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        outputs, states = [], []
        for document, (begin, end) in enumerate(pairwise(bounds)):
            state = q.new_zeros(q.shape[2], q.shape[3], v.shape[3])
            if initial_state is not None:
                state = initial_state[document]
            for t in range(begin, end):
                state = log_decay[0, t].exp()[:, None, None] * state
                new = v[0, t] - erase[0, t][:, None] * torch.einsum("hk,hkv->hv", k[0, t], state)
                state = state + k[0, t][..., None] * new[:, None]
                outputs.append(torch.einsum("hk,hkv->hv", q[0, t], state))
            states.append(state)
        return torch.stack(outputs)[None], torch.stack(states) if output_final_state else None


def use_copy(path):
    sys.modules["torchlmoe"] = None  # not to be imported
    spec = importlib.util.spec_from_file_location("copied_sequence", path)
    copied = importlib.util.module_from_spec(spec)
    sys.modules["copied_sequence"] = copied
    spec.loader.exec_module(copied)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 12, 2, 3), "k": (1, 12, 2, 3), "v": (1, 12, 2, 4), "log_decay": (1, 12, 2), "erase": (1, 12, 2)}
    tensors = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    tensors["log_decay"] = F.logsigmoid(tensors["log_decay"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for communication in copied.COMMUNICATIONS:
        options = {"cu_seqlens": torch.tensor([0, 2, 11, 12])}
        leaves = [x.requires_grad_() for x in tensors.values()]
        o = TokenLoop()(**tensors, **options)[0]
        expected = [o, *torch.autograd.grad(o.square().sum(), leaves)]
        module = parallelize_module(TokenLoop(), mesh, copied.LSMSequenceParallel(communication))
        spans = {name: x.detach().chunk(ranks, 1)[rank].clone().requires_grad_() for name, x in tensors.items()}
        o = module(**spans, **options)[0]
        found = [o, *torch.autograd.grad(o.square().sum(), list(spans.values()))]
        expected = [x.chunk(ranks, 1)[rank] for x in expected]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    dist.destroy_process_group()


def test_the_file_works_elsewhere(tmp_path):
    """Copied to a project without torchlmoe, on a custom module."""
    path = tmp_path / "copied_sequence.py"
    path.write_text(Path(sequence.__file__).read_text())
    run_on_ranks(3, use_copy, str(path))


def refuse():
    mesh, _ = mesh_and_cut()
    q = torch.zeros(1, 4, 1, 2)
    split = parallelize_module(LinearRecurrence(), mesh, LSMSequenceParallel())
    for options, message in (
        ({"output_final_state": True}, "Initial and final states are not supported if the sequence is split"),
        ({"initial_state": torch.zeros(1, 1, 2, 2)}, "Initial and final states are not supported"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens, from 0 to 4, must rise from 0 to the 8 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            split(q, q, q, **options)
    with pytest.raises(ValueError, match="communication = 'both' is unknown; use 'all_gather' or 'ring'"):
        LSMSequenceParallel("both")
    x, beta = torch.randn(1, 4, 1, 8), torch.rand(1, 4, 1)
    for terms in ({}, {"erase": beta}):  # not refused: autocast, which changes nothing
        expected, _ = split(x, x / 8, x, **terms)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(split(x, x / 8, x, **terms)[0], expected)


def freeze():
    """A start that needs no gradient, where the keys do: the ring's backward must not wait for one."""
    mesh, cut = mesh_and_cut()
    x, grad = torch.randn(2, 1, LENGTH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixer = build("ttt")
    mixer.fast_weights.requires_grad_(False)
    whole = SequenceLayout.of_rows(1, LENGTH)
    results = []
    for tokens in (whole, replace(whole, positions=cut("v", whole.positions))):
        part = (lambda x: x) if tokens is whole else (lambda x: cut("q", x))
        leaf = part(x).clone().requires_grad_()
        results.append(torch.autograd.grad(mixer(leaf, sequence=tokens), leaf, part(grad))[0])
        if tokens is whole:
            parallelize_module(mixer, mesh, mixer.context_parallel_plan())
    torch.testing.assert_close(results[1], cut("q", results[0]), rtol=1e-9, atol=1e-12)


def test_ring_from_a_frozen_start():
    run_on_ranks(3, freeze)


def test_wrong_uses_are_refused_and_autocast_is_not():
    run_on_ranks(2, refuse)
