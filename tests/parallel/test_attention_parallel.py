"""Attention over tokens spread over 2, 3 and 4 gloo processes equals the single process: outputs and gradients."""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from tests.conftest import run_on_ranks
from tests.parallel.small_blocks import DIM, block_of
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers.attention import Attention, InnerAttention
from torchlmoe.parallel.attention import AttentionSequenceParallel
from torchlmoe.parallel.compile import compile_block
from torchlmoe.parallel.recompute import recompute

LENGTH, HEADS, WIDTH = 48, 12, 6  # spans of 24, 16 and 12 tokens
COMMUNICATIONS = ("all_gather", "ulysses")
BOUNDS = {
    "one_document": [0, 48],
    "over_many_ranks": [0, 5, 43, 44, 48],
    "from_border_to_border": [0, 12, 16, 24, 32, 36, 48],
    "across_and_at_borders": [0, 7, 24, 29, 48],
    "empty_documents": [0, 0, 11, 11, 24, 24, 24, 31, 48, 48],
    "rows": None,
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def own(x, mesh):
    """The rank's span of x [B, T, ...]."""
    return x.detach().chunk(mesh.size(), 1)[mesh.get_local_rank()].clone()


def make_mesh():
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))


def parallel(module, mesh, communication, inner="inner"):
    style = module.get_submodule(inner).sequence_parallel_style(communication)
    return parallelize_module(module, mesh, {inner: style} if inner else style)


def assert_near(found, expected, dtype, case):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is dtype, case
        error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-3)
        assert error <= TOLERANCES[dtype], (case, float(error))


def inner_equals_single(mesh, name, window, num_groups, communication, dtype):
    bounds = BOUNDS[name]
    num_rows = 1 if bounds else 2
    options = dict(window=window, cu_seqlens=None if bounds is None else torch.tensor(bounds, dtype=torch.int32))
    shapes = [(num_rows, LENGTH, heads, WIDTH) for heads in (HEADS, num_groups, num_groups, HEADS)]
    *whole, grad = (randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    results = []
    for leaves, upstream, module in (
        (whole, grad, InnerAttention(HEADS)),
        ([own(x, mesh) for x in whole], own(grad, mesh), parallel(InnerAttention(HEADS), mesh, communication, "")),
    ):
        for leaf in leaves:
            leaf.requires_grad_()
        o = module(*leaves, **options)
        results.append([o, *torch.autograd.grad(o, leaves, upstream)])
    expected, found = results
    case = (name, window, num_groups, communication, dtype)
    assert_near(found, [own(x, mesh) for x in expected], dtype, case)


def mixer_equals_single(mesh, options, communication, dtype):
    """Parameters' gradients too, which add up over ranks."""
    x, grad = (randn(1, LENGTH, DIM, seed=seed, dtype=dtype) for seed in range(2))
    bounds = torch.tensor([BOUNDS["across_and_at_borders"]], dtype=torch.int32)
    sequence = Sequence.of_packed_rows(bounds, LENGTH)
    mixers = [Attention(DIM, num_heads=HEADS, head_dim=8, init_std=0.2, **options).to(dtype) for _ in range(2)]
    mixers[0].init_weights()
    mixers[1].load_state_dict(mixers[0].state_dict())
    expected = run_mixer(mixers[0], x, sequence, grad)
    spans = Sequence(own(sequence.positions, mesh), sequence.cu_seqlens)
    found = run_mixer(parallel(mixers[1], mesh, communication), own(x, mesh), spans, own(grad, mesh))
    for parameter in found[2:]:
        dist.all_reduce(parameter)
    assert_near(found, [*(own(x, mesh) for x in expected[:2]), *expected[2:]], dtype, (options, communication, dtype))


def run_mixer(mixer, x, sequence, grad):
    y = mixer(x.requires_grad_(), sequence=sequence)
    return [y, *torch.autograd.grad(y, [x, *mixer.parameters()], grad)]


LATENT = dict(kv_rank=16, q_rank=16, shared_key_dim=4, value_dim=5, rotary_fraction=0.5)
MIXERS = [LATENT, LATENT | {"sliding_window": 15}, dict(num_kv_heads=3, output_gate=True, qk_norm=True)]


def everything_equals_single():
    mesh = make_mesh()
    for communication in COMMUNICATIONS:
        for name in BOUNDS:
            # A window of 5 tokens is less than a span, one of 30 is more.
            for window, num_groups in ((None, 12), (None, 1), (5, 4), (30, 1), (1, 12)):
                inner_equals_single(mesh, name, window, num_groups, communication, torch.float64)
            for dtype in (torch.float32, torch.bfloat16):
                inner_equals_single(mesh, name, 30, 4, communication, dtype)
        for options in MIXERS:
            for dtype in TOLERANCES:
                mixer_equals_single(mesh, options, communication, dtype)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_spans_equal_the_single_process(world_size):
    run_on_ranks(world_size, everything_equals_single)


class Traffic(CommDebugMode):
    """Collectives in order: the name and the bytes that a rank hands in."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is not NotImplemented and func._overloadpacket in self.comm_registry:
            self.calls.append((func._overloadpacket.__name__, args[0].nbytes))
        return out


def collectives_are_counted():
    mesh = make_mesh()
    degree = mesh.size()
    span = LENGTH // degree
    for num_groups in (HEADS, 3, 1):
        traffic = {}
        for communication in COMMUNICATIONS:
            module = parallel(InnerAttention(HEADS), mesh, communication, "")
            heads = (HEADS, num_groups, num_groups)
            leaves = [randn(1, span, n, WIDTH, seed=0, dtype=torch.float32).requires_grad_() for n in heads]
            with Traffic() as counted:
                o = module(*leaves, cu_seqlens=torch.tensor([0, 5, LENGTH], dtype=torch.int32))
                counted.calls.append("backward")
                o.sum().backward()
            traffic[communication] = counted.calls
        token = WIDTH * 4
        keys = span * 2 * num_groups * token
        assert traffic["all_gather"] == [
            ("all_gather_into_tensor", keys),
            "backward",
            ("reduce_scatter_tensor", degree * keys),
        ]
        sent = num_groups if num_groups % degree == 0 else {(3, 4): 12, (3, 2): 6, (1, 2): 2, (1, 4): 4}[num_groups, degree]
        there, back = (("all_to_all_single", span * heads * token) for heads in (HEADS + 2 * sent, HEADS))
        assert traffic["ulysses"] == [there, back, "backward", back, there]


def compiled_equals_eager():
    mesh = make_mesh()
    for communication in COMMUNICATIONS:
        torch._dynamo.reset()
        counters.clear()
        eager, plain, again, recomputed = blocks = [block_of("attention", "dense") for _ in range(4)]
        for block in blocks:
            parallel(block, mesh, communication, "mixer.inner")
        recompute(recomputed, "full")
        for block in (plain, again, recomputed):
            compile_block(block, backend="aot_eager")
        # The second length compiles anew, for all lengths; the third, and other documents, do not.
        for length, bounds, num_graphs in ((32, [0, 20, 32], 1), (32, [0, 5, 32], 1), (48, [0, 1, 48], 2), (56, [0, 56, 56], 2)):
            results = [run_block(block, mesh, length, bounds) for block in (eager, plain, again)]
            for found in results[1:]:
                torch.testing.assert_close(found, results[0], rtol=1e-12, atol=1e-12)
            assert counters["stats"]["unique_graphs"] == num_graphs, (communication, length)
            torch.testing.assert_close(run_block(recomputed, mesh, length, bounds), results[0], rtol=1e-12, atol=1e-12)
            counters["stats"]["unique_graphs"] = num_graphs


def run_block(block, mesh, length, bounds):
    x = own(randn(1, length, DIM, seed=0), mesh).requires_grad_()
    sequence = Sequence.of_packed_rows(torch.tensor([bounds], dtype=torch.int32), length)
    y = block(x, sequence=Sequence(own(sequence.positions, mesh), sequence.cu_seqlens, length))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def counted_and_compiled():
    collectives_are_counted()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_collective_each_way_and_its_bytes(world_size):
    run_on_ranks(world_size, collectives_are_counted)


def test_compiled_as_one_graph_and_recomputed():
    run_on_ranks(2, compiled_equals_eager)


def refused():
    mesh = make_mesh()
    mixer = Attention(DIM, num_heads=3, head_dim=4)
    with pytest.raises(ValueError, match="ulysses cannot spread num_heads = 3 over 2 ranks; make num_heads a multiple of 2"):
        parallel(mixer, mesh, "ulysses")
    parallel(mixer, mesh, "all_gather")


def test_refused_and_nothing_to_do():
    with pytest.raises(ValueError, match="communication = 'ring' must be 'all_gather' or 'ulysses'"):
        AttentionSequenceParallel("ring")
    run_on_ranks(2, refused)
    run_on_ranks(1, nothing_to_do)


def nothing_to_do():
    mesh = make_mesh()
    for communication in COMMUNICATIONS:
        inner = parallel(InnerAttention(3), mesh, communication, "")
        assert not inner._forward_pre_hooks
        assert not inner._forward_hooks
