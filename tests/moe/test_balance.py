"""Balancing losses and counters against plain formulas; recompute, accumulation, the loss-free bias."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.layers.sequence import MicrobatchShare, SequenceLayout

DIM, BATCH, LENGTH = 8, 4, 10


def make(**options):
    torch.manual_seed(0)
    options = {"num_experts": 6, "top_k": 2, "expert_dim": 4, "aux_loss_weight": 0.5} | options
    moe = MoE(DIM, **options).double()
    moe.init_weights()
    torch.nn.init.normal_(moe.router.weight)
    return moe, torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)


def describe(x, loss_weight=1.0, counted=None):
    batch_size, length, _ = x.shape
    positions = torch.arange(length).expand(batch_size, -1)
    return SequenceLayout(positions, share=MicrobatchShare(loss_weight, length, counted))


def gradients(moe):
    return {name: parameter.grad for name, parameter in moe.named_parameters()}


# A row that ends in padding, and one that is nothing else.
PADDED = (torch.arange(LENGTH) < torch.tensor([LENGTH, 3, LENGTH, 0])[:, None]).double()
LAST_COUNTS = torch.tensor([5, 0, 1, 9, 2, 3])


def losses_by_formula(moe, x, scope, score_function, counted):
    """The auxiliary loss and the z-loss as written in the papers, and the choices per expert.

    counted [B, T]: 1 or, where there is padding, 0.
    """
    logits = x @ moe.router.weight.T
    score = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    probability = score / score.sum(-1, keepdim=True)
    chosen = torch.nn.functional.one_hot(score.topk(2).indices, 6).sum(-2).double() * counted[..., None]
    probability = probability * counted[..., None]
    spans = [slice(row, row + 1) for row in range(len(x))] if scope == "sequence" else [slice(None)]
    aux = 0
    for span in spans:
        counts = chosen[span].sum((0, 1)) if scope == "sequence" else LAST_COUNTS.double()
        fraction = counts / counts.sum().clamp(min=1)
        aux = aux + 6 * (fraction * probability[span].mean((0, 1))).sum() / len(spans)
    z = (torch.log(logits.exp().sum(-1)).pow(2) * counted).mean()
    return 0.5 * aux, z, chosen.sum((0, 1)).long()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
@pytest.mark.parametrize(("z_loss_weight", "counted"), [(0.0, None), (0.3, None), (0.3, PADDED)])
def test_injected_gradients_are_those_of_the_formula(scope, score_function, z_loss_weight, counted):
    options = {"aux_loss_scope": scope, "score_function": score_function}
    moe, x = make(**options, z_loss_weight=z_loss_weight)
    moe.end_step(LAST_COUNTS)
    plain, _ = make(score_function=score_function, balance="none")
    grad = torch.randn_like(x)

    leaf = x.clone().requires_grad_()
    y = moe(leaf, sequence=describe(x, loss_weight=0.25, counted=None if counted is None else counted > 0))
    y.backward(grad)

    plain_leaf = x.clone().requires_grad_()
    aux, z, counts = losses_by_formula(
        plain, plain_leaf, scope, score_function, torch.ones(BATCH, LENGTH) if counted is None else counted
    )
    expected = plain(plain_leaf, sequence=describe(x))
    ((expected * grad).sum() + 0.25 * (aux + z_loss_weight * z)).backward()

    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(leaf.grad, plain_leaf.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(moe), gradients(plain), rtol=1e-12, atol=1e-12)
    counters = moe.pop_counters()
    assert torch.equal(counters["counts"], counts)
    torch.testing.assert_close(counters["aux_loss"], 0.25 * aux.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(counters["z_loss"], 0.25 * z_loss_weight * z.detach(), rtol=1e-12, atol=0)


def test_balanced_router_has_the_least_loss():
    """Uniform probabilities and even choices give exactly the weight; there the gradient vanishes."""
    moe, _ = make(top_k=6)
    moe.router.weight.data.zero_()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    moe(x, sequence=describe(x)).sum().backward()
    torch.testing.assert_close(moe.pop_counters()["aux_loss"], torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recompute_counts_once(use_reentrant):
    moe, x = make(z_loss_weight=0.1, capacity_factor=1.0)
    again = copy.deepcopy(moe)
    sequence = describe(x)
    moe(x.requires_grad_(), sequence=sequence).square().sum().backward()
    x_again = x.detach().clone().requires_grad_()
    y = checkpoint(lambda x: again(x, sequence=sequence), x_again, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, x_again.grad)
    torch.testing.assert_close(gradients(again), gradients(moe), rtol=0, atol=0)
    torch.testing.assert_close(again.pop_counters(), moe.pop_counters(), rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
def test_two_microbatches_are_one_batch(scope):
    moe, x = make(aux_loss_scope=scope, z_loss_weight=0.1)
    moe.end_step(LAST_COUNTS)
    pieces = copy.deepcopy(moe)
    (moe(x, sequence=describe(x)).square().sum()).backward()
    for piece in (x[:1], x[1:]):
        # Both forwards might run before the backwards, as in a pipeline; here they alternate.
        pieces(piece, sequence=describe(piece, loss_weight=len(piece) / BATCH)).square().sum().backward()
    torch.testing.assert_close(gradients(pieces), gradients(moe), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pieces.pop_counters(), moe.pop_counters(), rtol=1e-12, atol=1e-12)


def test_counters_wait_for_the_backward():
    """Forwards that run ahead, evaluation, no_grad and zero weight count nothing; popping starts anew."""
    moe, x = make()
    outputs = [moe(x, sequence=describe(x)) for _ in range(2)]
    assert not moe.pop_counters()["counts"].any()
    for y in outputs:
        y.sum().backward()
    assert moe.pop_counters()["counts"].sum() == 2 * 2 * BATCH * LENGTH
    moe.eval()
    moe(x.requires_grad_(), sequence=describe(x)).sum().backward()
    moe.train()
    with torch.no_grad():
        moe(x, sequence=describe(x))
    moe(x, sequence=describe(x, loss_weight=0.0)).sum().backward()
    assert not any(total.any() for total in moe.pop_counters().values())


def test_a_moved_layer_still_counts():
    moe, x = make()
    low = moe.to(torch.bfloat16)
    low(x.bfloat16().requires_grad_(), sequence=describe(x)).sum().backward()
    assert low.pop_counters()["counts"].sum() == 2 * BATCH * LENGTH


def test_sequence_scope_needs_whole_rows():
    moe, x = make(aux_loss_scope="sequence")
    with pytest.raises(ValueError, match="row_length to divide the 40 tokens of the microbatch, got 7"):
        moe(
            x,
            sequence=SequenceLayout(torch.zeros(BATCH, LENGTH, dtype=torch.int64), share=MicrobatchShare(row_length=7)),
        )


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_loss_free_bias_balances_a_skewed_router(score_function):
    moe, _ = make(balance="loss_free", score_function=score_function, bias_update_rate=0.002)
    x = torch.randn(1, 512, DIM, dtype=torch.float64)
    x[..., 0] = 1.0
    moe.router.weight.data.normal_(std=0.3)
    moe.router.weight.data[:, 0] = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -2.0])
    loads = []
    for _ in range(400):
        moe(x, sequence=describe(x)).sum().backward()
        counters = moe.pop_counters()
        loads.append(counters["counts"].max() / counters["counts"].double().mean())
        assert counters["aux_loss"] == 0
        moe.end_step(counters["counts"])
    assert loads[0] > 2
    assert loads[-1] < 1.1


def test_bias_update_is_the_papers():
    moe, _ = make(balance="loss_free", bias_update_rate=0.125)
    moe.end_step(torch.tensor([4, 0, 9, 4, 3, 4]))
    assert moe.router.expert_bias.tolist() == [0.0, 0.125, -0.125, 0.0, 0.125, 0.0]


def test_bias_changes_the_choice_only():
    moe, x = make(balance="loss_free", normalize_top_k=False)
    before = moe.router(x.flatten(0, 1))
    moe.router.expert_bias.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0]))
    after = moe.router(x.flatten(0, 1))
    assert set(after.expert_TK.unique().tolist()) == {0, 1}
    torch.testing.assert_close(after.probability_TE, before.probability_TE)
    torch.testing.assert_close(after.weight_TK, before.probability_TE.gather(-1, after.expert_TK))
