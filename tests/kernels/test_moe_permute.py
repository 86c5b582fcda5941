"""The Triton way to the experts and back against plain indexing, in float64."""

import pytest
import torch

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.kernels.moe_permute import permute, unpermute
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.routing.dispatch import Slots

NUM_EXPERTS, TOP_K = 5, 3


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_slots(num_tokens, device):
    """Experts 1 and 4 are never chosen in half of the cases."""
    wanted = torch.rand(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(num_tokens))
    if num_tokens % 2:
        wanted[:, [1, 4]] = -1
    return Slots.sorted_by_expert(wanted.topk(TOP_K).indices.to(device), NUM_EXPERTS)


def check(function, plain, device, *inputs, dtype=torch.float32, tolerance=1e-6):
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = plain(*leaves)
    cotangent = randn(*expected.shape, seed=9)
    expected = [expected, *torch.autograd.grad(expected, leaves, cotangent)]
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    y = function(*leaves)
    found = [y, *torch.autograd.grad(y, leaves, cotangent.to(device, dtype))]
    for x, reference in zip(found, expected, strict=True):
        assert x.dtype is dtype
        assert x.shape == reference.shape
        assert (x.cpu().double() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize(("num_tokens", "dim"), [(1, 1), (7, 40), (20, 16), (0, 4)])
def test_values_and_gradients(num_tokens, dim, device, half):
    slots = make_slots(num_tokens, device)
    token_M, choice_M = slots.token_M.cpu(), slots.choice_M.cpu()
    x_TD, x_MD = randn(num_tokens, dim), randn(num_tokens * TOP_K, dim, seed=1)
    weight_TK = randn(num_tokens, TOP_K, seed=2)

    def plain_sum(x_MD, weight_TK):
        return torch.zeros_like(x_TD).index_add(0, token_M, x_MD * weight_TK.flatten()[choice_M][:, None])

    where = (slots.token_M, slots.slot_TK)
    check(lambda x: permute(x, *where), lambda x: x[token_M], device, x_TD)
    check(lambda x: unpermute(x, *where, None), lambda x: plain_sum(x, torch.ones_like(weight_TK)), device, x_MD)
    check(lambda x, weight: unpermute(x, *where, weight), plain_sum, device, x_MD, weight_TK)
    in_half = (x_MD.to(half).double(), weight_TK.to(half).double())
    options = dict(dtype=half, tolerance=2 * torch.finfo(half).eps)
    check(lambda x, weight: unpermute(x, *where, weight), plain_sum, device, *in_half, **options)


def test_low_precision_is_summed_in_float32(device):
    """1 + 2^-11 + 2^-11 is a float16 number, but not if the first sum is rounded."""
    slots = Slots.sorted_by_expert(torch.tensor([[0, 1, 2]], device=device), 3)
    x = torch.tensor([[1.0], [2.0**-11], [2.0**-11]], dtype=torch.float16, device=device)
    assert unpermute(x, slots.token_M, slots.slot_TK, None).item() == 1 + 2.0**-10


def test_strides(device):
    slots = make_slots(7, device)
    wide = torch.full((7, 30), torch.nan, device=device)
    x = wide[:, 4:20].copy_(randn(7, 16)).detach().requires_grad_()
    y = permute(x, slots.token_M, slots.slot_TK)
    assert torch.equal(y, x[slots.token_M])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.full_like(dx, TOP_K))


def test_registered_operations(device):
    slots = make_slots(2, device)
    where = (slots.token_M, slots.slot_TK)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x_TD, x_MD, weight = (randn(*shape).float().to(device).requires_grad_() for shape in ((2, 4), (6, 4), (2, 3)))
    operations = torch.ops.torchlmoe
    torch.library.opcheck(operations.permute_triton.default, (x_TD, *where), test_utils=tests)
    torch.library.opcheck(operations.unpermute_triton.default, (x_MD, *where, weight), test_utils=tests)


def test_layer_takes_it(device, monkeypatch):
    """On a GPU the layer runs these operations and gets what it gets on a CPU."""
    layer = MoE(8, num_experts=4, top_k=2, expert_dim=16)
    layer.init_weights()

    def run(device):
        layer.zero_grad()
        x = randn(1, 5, 8).float().to(device).requires_grad_()
        y = layer.to(device)(x, sequence=SequenceLayout.of_rows(1, 5, device))
        return [y.cpu(), *(g.cpu() for g in torch.autograd.grad(y.square().sum(), (x, *layer.experts.parameters())))]

    expected, calls = run("cpu"), []
    operations = torch.ops.torchlmoe
    for place in ("routing.dispatch", "ops.weighted_swiglu"):
        monkeypatch.setattr(f"torchlmoe.{place}.kernels_serve", lambda *_: True)
    for place in ("moe_permute.permute", "weighted_swiglu.weighted_swiglu", "moe_permute.unpermute"):
        name = place.partition(".")[2]
        operation = getattr(operations, f"{name}_triton")
        monkeypatch.setattr(
            f"torchlmoe.kernels.{place}",
            lambda *args, name=name, operation=operation: (calls.append(name), operation(*args))[1],
        )
    torch.testing.assert_close(run(device), expected)
    assert calls[:3] == ["permute", "weighted_swiglu", "unpermute"]
