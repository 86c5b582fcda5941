"""Attention over tokens spread over 2, 3 and 4 gloo processes equals the single process: outputs and gradients.

Processes take seconds to start: what they check, they check in one start, on meshes that are parts of the four.
"""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from tests.conftest import run_on_ranks
from tests.parallel.small_blocks import DIM, block_of
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.attention import Attention, InnerAttention
from torchlmoe.parallel.compile import compile_block
from torchlmoe.parallel.recompute import recompute
from torchlmoe.styles.attention import AttentionSequenceParallel

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
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def own(x, mesh):
    """The rank's span of x [B, T, ...]."""
    return x.detach().chunk(mesh.size(), 1)[mesh.get_local_rank()].clone()


def mesh_of(degree):
    """Replicas of `degree` ranks each, as many as there are ranks for; of three ranks one. None: this rank is idle."""
    num_replicas = dist.get_world_size() // degree
    ranks = torch.arange(num_replicas * degree).view(num_replicas, degree)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("dp", "cp"))
    return None if mesh.get_coordinate() is None else mesh["cp"]


def parallel(module, mesh, communication, inner="inner"):
    style = module.get_submodule(inner).context_parallel_style("all_gather", communication)
    return parallelize_module(module, mesh, {inner: style} if inner else style)


def assert_near(found, expected, dtype, case):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is dtype, case
        error = float((ours - theirs).detach().norm() / theirs.detach().norm())
        assert error <= TOLERANCES[dtype], (case, error)


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
    sequence = SequenceLayout.of_packed_rows(bounds, LENGTH)
    mixers = [Attention(DIM, num_heads=HEADS, head_dim=8, init_std=0.2, **options).to(dtype) for _ in range(2)]
    torch.manual_seed(0)
    mixers[0].init_weights()
    mixers[1].load_state_dict(mixers[0].state_dict())
    expected = run_mixer(mixers[0], x, sequence, grad)
    spans = SequenceLayout(own(sequence.positions, mesh), sequence.cu_seqlens)
    found = run_mixer(parallel(mixers[1], mesh, communication), own(x, mesh), spans, own(grad, mesh))
    for parameter in found[2:]:
        dist.all_reduce(parameter, group=mesh.get_group())
    assert_near(found, [*(own(x, mesh) for x in expected[:2]), *expected[2:]], dtype, (options, communication, dtype))


def run_mixer(mixer, x, sequence, grad):
    y = mixer(x.requires_grad_(), sequence=sequence)
    return [y, *torch.autograd.grad(y, [x, *mixer.parameters()], grad)]


LATENT = dict(kv_rank=16, q_rank=16, shared_key_dim=4, value_dim=5, rotary_fraction=0.5)
ROPE = dict(type="yarn", factor=4.0, original_max_position_embeddings=16)
BIASES = dict(qkv_bias=True, output_bias=True, output_gate="per_head", softmax_scale=0.7)
MIXERS = [LATENT, LATENT | {"sliding_window": 15}, dict(num_kv_heads=3, output_gate=True, qk_norm=True)]
MIXERS += [
    LATENT | BIASES | {"rope_scaling": ROPE | {"mscale_all_dim": 2.0}},
    dict(num_kv_heads=3, qk_norm="all_heads", rope_scaling=ROPE, **BIASES),
]


def spans_equal_single(mesh):
    for communication in COMMUNICATIONS:
        for name in BOUNDS:
            # A window of 5 tokens is less than a span, one of 30 is more.
            for window, num_groups in ((None, 12), (None, 1), (5, 4), (30, 1)):
                inner_equals_single(mesh, name, window, num_groups, communication, torch.float64)
            for dtype in (torch.float32, torch.bfloat16):
                inner_equals_single(mesh, name, 30, 4, communication, dtype)
        for options in MIXERS:
            for dtype in (torch.float64, torch.float32):
                mixer_equals_single(mesh, options, communication, dtype)


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


def collectives_are_counted(mesh):
    degree = mesh.size()
    span, token = LENGTH // degree, WIDTH * 4
    # Ulysses sends a key's head as often as it takes to have a multiple of the ranks.
    for num_groups, num_sent in ((12, {2: 12, 3: 12, 4: 12}), (4, {2: 4, 3: 12, 4: 4}), (1, {2: 2, 3: 3, 4: 4})):
        calls = {}
        for communication in COMMUNICATIONS:
            module = parallel(InnerAttention(HEADS), mesh, communication, "")
            heads = (HEADS, num_groups, num_groups)
            leaves = [randn(1, span, n, WIDTH, seed=0, dtype=torch.float32).requires_grad_() for n in heads]
            with Traffic() as traffic:
                o = module(*leaves, cu_seqlens=torch.tensor([0, 5, LENGTH], dtype=torch.int32))
                traffic.calls.append("backward")
                o.sum().backward()
            calls[communication] = traffic.calls
        keys = span * 2 * num_groups * token
        gathered, scattered = ("all_gather_into_tensor", keys), ("reduce_scatter_tensor", degree * keys)
        assert calls["all_gather"] == [gathered, "backward", scattered]
        there, back = (
            ("all_to_all_single", span * num_heads * token) for num_heads in (HEADS + 2 * num_sent[degree], HEADS)
        )
        assert calls["ulysses"] == [there, back, "backward", back, there]


def refuses(mesh):
    degree = mesh.size()
    mixer = Attention(DIM, num_heads=degree + 1, head_dim=4)
    sentence = f"num_heads = {degree + 1} over {degree} ranks; make num_heads a multiple of {degree}"
    with pytest.raises(ValueError, match=f"ulysses cannot spread {sentence}, or use all_gather."):
        parallel(mixer, mesh, "ulysses")
    parallel(mixer, mesh, "all_gather")


def leaves_alone(mesh):
    for communication in COMMUNICATIONS:
        inner = parallel(InnerAttention(3), mesh, communication, "")
        assert not inner._forward_pre_hooks
        assert not inner._forward_hooks


def check_on_ranks():
    dist.init_process_group("gloo")
    leaves_alone(mesh_of(1))
    for mesh in map(mesh_of, (2, 3, 4)):
        if mesh is not None:
            refuses(mesh)
            collectives_are_counted(mesh)
            spans_equal_single(mesh)


def test_spans_equal_the_single_process_by_one_collective_each_way():
    run_on_ranks(4, check_on_ranks)


def run_block(block, mesh, length, bounds):
    x = own(randn(1, length, DIM, seed=0), mesh).requires_grad_()
    sequence = SequenceLayout.of_packed_rows(torch.tensor([bounds], dtype=torch.int32), length)
    positions = own(sequence.positions, mesh)
    # Said to vary, which saves the test a second graph.
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.mark_dynamic(positions, 1)
    y = block(x, sequence=SequenceLayout(positions, sequence.cu_seqlens, length))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def compiled_equals_eager():
    dist.init_process_group("gloo")
    mesh = mesh_of(2)
    for communication in COMMUNICATIONS:
        torch._dynamo.reset()
        counters.clear()
        blocks = [block_of("attention", "dense") for _ in range(4)]
        for block in blocks:
            parallel(block, mesh, communication, "mixer.inner")
        recompute(blocks[1], "selective")
        for block in blocks[2:]:
            recompute(block, "full")
            compile_block(block, backend="aot_eager")
        for bounds in ([0, 20, 32], [0, 5, 32], [0, 56, 56]):
            expected, *found = (run_block(block, mesh, bounds[-1], bounds) for block in blocks)
            for each in found:
                torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
        # Other documents and lengths, and another block, do not need a separate graph.
        assert counters["stats"]["unique_graphs"] == 1, communication


def test_compiled_as_one_graph_and_recomputed():
    run_on_ranks(2, compiled_equals_eager)


def test_unknown_communication():
    with pytest.raises(ValueError, match="communication = 'ring' must be 'all_gather' or 'ulysses'"):
        AttentionSequenceParallel("ring")
