"""grouped_matmul against one torch matmul per group: values, gradients, dtypes, empty groups, refusals."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import torchlmoe.ops.grouped_matmul as module
from torchlmoe.ops.grouped_matmul import grouped_matmul

ENDS = [0, 5, 5, 6, 40, 40]  # empty groups at both ends and within, and a group of one row
OFFSETS = torch.tensor(ENDS, dtype=torch.int32)


@pytest.fixture
def poison():
    """Fills `torch.empty` with NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(in_dim, out_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(ENDS[-1], in_dim), (len(ENDS), out_dim, in_dim), (ENDS[-1], out_dim)]
    x, weight, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), grad


def one_by_one(x, weight):
    return torch.cat([x[a:b] @ weight[e].T for e, (a, b) in enumerate(itertools.pairwise([0, *ENDS]))])


def assert_matches(inputs, tolerance):
    x, weight, grad = inputs
    y = grouped_matmul(x, weight, OFFSETS)
    assert y.dtype is x.dtype
    found = [y, *torch.autograd.grad(y, (x, weight), grad)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    y = one_by_one(*exact)
    expected = [y, *torch.autograd.grad(y, exact, grad.double())]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("widths", [(8, 16), (7, 16), (8, 5), (1, 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_equals_one_matmul_per_group(widths, dtype, tolerance):
    assert_matches(make_inputs(*widths, dtype), tolerance)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layouts(dtype):
    """A transposed weight, an expanded gradient and strided rows give what contiguous ones give."""
    x, weight, _ = make_inputs(8, 16, dtype)
    strided = torch.stack([x.detach(), x.detach()], -1)[..., 0]
    transposed = weight.detach().mT.contiguous().mT
    scattered = torch.stack([weight.detach()] * 2, -1)[..., 0]
    for other in (transposed, scattered):
        torch.testing.assert_close(grouped_matmul(strided, other, OFFSETS), grouped_matmul(x, weight, OFFSETS))
    grad = torch.autograd.grad(grouped_matmul(x, weight, OFFSETS).sum(), (x, weight))
    expected = torch.autograd.grad(one_by_one(x, weight).sum(), (x, weight))
    torch.testing.assert_close(grad, expected)


def test_no_rows():
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    y = grouped_matmul(x, weight, torch.zeros(3, dtype=torch.int32))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert not weight.grad.any()


def test_gradients_of_any_order():
    x, weight, _ = make_inputs(3, 2, torch.float64)
    torch.autograd.gradcheck(grouped_matmul, (x, weight, OFFSETS))
    torch.autograd.gradgradcheck(grouped_matmul, (x, weight, OFFSETS))


@pytest.mark.parametrize("name", ["grouped_matmul", "grouped_outer"])
def test_registered_operation(name):
    x, weight, grad = make_inputs(8, 16, torch.float32)
    operands = (x, weight) if name == "grouped_matmul" else (grad.requires_grad_(), x)
    torch.library.opcheck(
        getattr(torch.ops.torchlmoe, name).default,
        (*operands, OFFSETS),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )


def test_flops_are_counted():
    x, weight, grad = make_inputs(8, 16, torch.float32)
    with FlopCounterMode(display=False) as counter:
        grouped_matmul(x, weight, OFFSETS).backward(grad)
    assert counter.get_total_flops() == 3 * 2 * ENDS[-1] * 8 * 16


def test_bfloat16_without_instructions(monkeypatch):
    """The path of a CPU without bfloat16 instructions: float32 products, rounded once."""
    monkeypatch.setattr(module, "cpu_lacks_bfloat16", lambda: True)
    x, weight, _ = make_inputs(8, 16, torch.bfloat16)
    expected = one_by_one(x.detach().float(), weight.detach().float()).bfloat16()
    assert torch.equal(grouped_matmul(x, weight, OFFSETS), expected)
    assert_matches(make_inputs(8, 16, torch.bfloat16), 4e-3)


def test_slow_path_is_said_once(caplog):
    module._say_misaligned.cache_clear()
    x, weight, _ = make_inputs(9, 16, torch.float32)
    for _ in range(2):
        grouped_matmul(x, weight, OFFSETS)
    assert caplog.text.count("runs one group at a time (slower): the widths (16, 9)") == 1


def test_refusals():
    x, weight, _ = make_inputs(8, 16, torch.float32)
    with pytest.raises(ValueError, match=r"got \[40, 8\] and \[6, 8, 16\]"):
        grouped_matmul(x, weight.mT, OFFSETS)
    with pytest.raises(ValueError, match=r"x is torch.float64 and weight is torch.float32"):
        grouped_matmul(x.double(), weight, OFFSETS)
    with pytest.raises(ValueError, match=r"offsets_E is torch.int64 \[6\], but must be int32 \[6\]"):
        grouped_matmul(x, weight, OFFSETS.long())
    with pytest.raises(ValueError, match="The last group ends at row 39, but x has 40 rows"):
        grouped_matmul(x, weight, OFFSETS.clamp_max(39))
