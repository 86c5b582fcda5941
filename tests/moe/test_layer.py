"""The layer against a loop over tokens, in float64; capacity, dtypes, unwritten memory, compile, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.routing.router import _top

DIM, BATCH, LENGTH = 8, 2, 13
SMALL = {"num_experts": 6, "top_k": 2, "expert_dim": 4}


def make(dtype=torch.float64, router_std=0.3, **options):
    torch.manual_seed(0)
    moe = MoE(DIM, **(SMALL | options), init_std=0.3).to(dtype)
    moe.init_weights()
    torch.nn.init.normal_(moe.router.weight, std=router_std)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64).to(dtype).requires_grad_()
    return moe, x, SequenceLayout.of_rows(BATCH, LENGTH)


def token_by_token(moe, x, capacity=math.inf):
    """The definition: returns y and how many choices found their expert full."""
    served = [0] * moe.num_experts
    rows, dropped = [], 0
    for token in x.flatten(0, 1):
        probability = (moe.router.weight @ token).softmax(-1)
        expert = sorted(range(moe.num_experts), key=lambda e: (-probability[e].item(), e))[: moe.top_k]
        row = torch.zeros_like(token)
        for e in expert:
            weight = probability[e] / probability[expert].sum()
            served[e] += 1
            if served[e] > capacity:
                dropped += 1
                continue
            given = token if moe.to_latent is None else moe.to_latent.weight @ token
            if moe.experts.has_gate:
                gate, up = (moe.experts.gate_up_proj[e] @ given).chunk(2)
                y = moe.experts.down_proj[e] @ (F.silu(gate) * up)
            else:
                y = moe.experts.down_proj[e] @ (moe.experts.up_proj[e] @ given).clamp(min=0).square()
            row = row + weight * (y if moe.from_latent is None else moe.from_latent.weight @ y)
        if not moe.experts.has_gate and moe.shared_expert is not None:
            hidden = (moe.shared_expert.up_proj.weight @ token).clamp(min=0).square()
            row = row + moe.shared_expert.down_proj.weight @ hidden
        rows.append(row)
    return torch.stack(rows).view_as(x), dropped


def assert_same_gradients(moe, x, y, expected, grad):
    leaves = [x, *moe.parameters()]
    found = torch.autograd.grad(y, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"latent_dim": 5}, {"num_shared_experts": 2}])
def test_experts_without_gate(options):
    """relu(up)^2, the shared expert's too; with a latent width alone the routed ones are narrower."""
    moe, x, sequence = make(activation="relu2", balance="none", **options)
    width = options.get("latent_dim", DIM)
    shapes = {name: list(stack.shape) for name, stack in moe.experts.named_parameters()}
    assert shapes == {"up_proj": [6, 4, width], "down_proj": [6, width, 4]}
    y = moe(x, sequence=sequence)
    expected, _ = token_by_token(moe, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(moe, x, y, expected, torch.randn_like(y))


@pytest.mark.parametrize("router_std", [0.0, 0.3, 30.0])
def test_equals_token_by_token(router_std):
    """Equal scores (ties), ordinary ones, and a router so sure that some experts get nothing."""
    moe, x, sequence = make(router_std=router_std, balance="none")
    y = moe(x, sequence=sequence)
    expected, _ = token_by_token(moe, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(moe, x, y, expected, torch.randn_like(y))


def test_float32_chooses_as_a_stable_sort():
    """Of equal scores the first, with zeros of both signs, infinite scores and those that are no numbers."""
    factor_T1 = torch.tensor([0.5, -0.0, 1e-42, torch.inf]).repeat(50)[:, None]
    score_TE = torch.randint(-3, 4, (200, 9)) * factor_T1
    assert score_TE.isnan().any()
    expected_TK = score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :5]
    assert torch.equal(_top(score_TE, 5), expected_TK)


@pytest.mark.parametrize("capacity_factor", [0.3, 0.8, 1.0, 6.0])
def test_capacity(capacity_factor):
    moe, x, sequence = make(balance="none", capacity_factor=capacity_factor)
    y = moe(x, sequence=sequence)
    expected, dropped = token_by_token(moe, x, math.ceil(capacity_factor * 2 * BATCH * LENGTH / 6))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(moe, x, y, expected, torch.randn_like(y))
    assert (dropped > 0) == (capacity_factor < 6)
    moe(x, sequence=sequence).sum().backward()
    counters = moe.pop_counters()
    assert counters["dropped"] == dropped
    assert counters["counts"].sum() == 2 * BATCH * LENGTH  # what was chosen, drops included


def test_finite_differences():
    moe, x, sequence = make(balance="none", num_shared_experts=1, shared_expert_gate=True)
    names = [name for name, _ in moe.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), x, {"sequence": sequence})

    torch.autograd.gradcheck(function, (x, *moe.parameters()), fast_mode=True)


@pytest.mark.parametrize("expert_dim", [8, 5])
def test_no_unwritten_memory(expert_dim):
    """With `torch.empty` full of NaN, and experts without tokens, all is finite, in every dtype."""
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            options = {
                "num_experts": 64,
                "expert_dim": expert_dim,
                "num_shared_experts": 1,
                "capacity_factor": 1.0,
            }
            moe, x, sequence = make(dtype, router_std=30.0, z_loss_weight=1e-3, **options)
            y = moe(x, sequence=sequence)
            y.sum().backward()
            counters = moe.pop_counters()
            assert counters["counts"].min() == 0
            for tensor in (y, x.grad, *(p.grad for p in moe.parameters()), *counters.values()):
                assert torch.isfinite(tensor).all()
            again = moe(x, sequence=sequence)
            assert torch.equal(y, again)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance):
    """Against float64 with the same rounded weights; the router computes in float32 and chooses alike."""
    low, x, sequence = make(dtype)
    low.router.to(torch.promote_types(dtype, torch.float32))
    exact, _, _ = make()
    exact.load_state_dict(low.state_dict())
    exact_x = x.detach().double().requires_grad_()
    grad = torch.randn_like(x)
    y, expected = low(x, sequence=sequence), exact(exact_x, sequence=sequence)
    y.backward(grad)
    expected.backward(grad.double())
    assert y.dtype is dtype
    assert low.router(x.flatten(0, 1)).weight_TK.dtype is torch.float32
    pairs = [(y, expected), (x.grad, exact_x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(low.parameters(), exact.parameters(), strict=True)]
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
    assert torch.equal(low.pop_counters()["counts"], exact.pop_counters()["counts"])


def test_router_stays_float32():
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        moe = MoE(DIM, **SMALL)
        assert moe.experts.down_proj.dtype is torch.bfloat16
        assert moe.router.weight.dtype is torch.float32
    finally:
        torch.set_default_dtype(default)


def test_compiled_whole():
    """One graph, counters included, with the same result."""
    moe, x, sequence = make(num_shared_experts=1, z_loss_weight=0.01, capacity_factor=1.0)
    results = []
    for layer in (moe, torch.compile(moe, backend="aot_eager", fullgraph=True)):
        leaves = [x, *moe.parameters()]
        for leaf in leaves:
            leaf.grad = None
        y = layer(x, sequence=sequence)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves), *moe.pop_counters().values()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_built_on_meta_device():
    with torch.device("meta"):
        moe = MoE(DIM, **SMALL, balance="loss_free")
    moe.to_empty(device="cpu")
    moe.init_weights()
    assert not moe.router.expert_bias.any()
    assert not any(total.any() for total in moe.pop_counters().values())
    assert set(moe.state_dict()) == {
        "router.weight",
        "router.expert_bias",
        "experts.gate_up_proj",
        "experts.down_proj",
    }


def test_flops_per_token():
    moe = MoE(8, num_experts=6, top_k=2, expert_dim=4, num_shared_experts=3, shared_expert_gate=True)
    assert moe.flops_per_token() == 2 * (8 * 6 + 2 * 3 * 8 * 4 + 3 * 8 * 12 + 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 7}, "top_k = 7 must lie between 1 and the 6 experts"),
        ({"top_k": 0}, "top_k = 0 must lie between 1"),
        ({"num_expert_groups": 4}, "num_experts = 6 does not split into num_expert_groups = 4"),
        (
            {"num_expert_groups": 3, "num_limited_groups": 4},
            "num_limited_groups = 4 must lie between 1 and num_expert_groups = 3",
        ),
        (
            {"num_expert_groups": 3, "top_k": 3},
            r"the 2 experts that a token can choose from \(1 of 3 groups of 2\)",
        ),
        (
            {"num_expert_groups": 6, "num_limited_groups": 2, "group_score": "top2_sum"},
            "needs at least two experts in a group",
        ),
        ({"score_function": "tanh"}, "score_function = 'tanh' is unknown: choose from softmax, sigmoid"),
        ({"group_score": "mean"}, "group_score = 'mean' is unknown"),
        ({"balance": "hope"}, "balance = 'hope' is unknown"),
        ({"aux_loss_scope": "rank"}, "aux_loss_scope = 'rank' is unknown"),
        ({"shared_expert_gate": True}, "shared_expert_gate has no shared expert to gate"),
        ({"capacity_factor": 0.0}, "capacity_factor = 0.0 must be positive"),
        ({"aux_loss_weight": -1.0}, "aux_loss_weight = -1.0 must not be negative"),
        ({"balance": "loss_free", "bias_update_rate": 0.0}, "bias_update_rate = 0.0 must be positive"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(DIM, **(SMALL | options))
