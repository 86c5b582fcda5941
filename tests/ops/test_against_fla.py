"""The recurrences against flash-linear-attention's naive functions, whose inputs, outputs and gradients are fixtures.

`tests/fixtures/make_fla_fixtures.py` makes them and says what is in them.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from torchlmoe.layers.feature_maps import taylor_features
from torchlmoe.ops import elementwise_recurrence, linear_recurrence, online_gradient
from torchlmoe.ops.pair_products import pair_products

FIXTURES = Path(__file__).parents[1] / "fixtures"


def recur(q, k, v, *, heads_first=False, scale=None, **terms):
    """fla's layout and its default scale; returns (o, final state)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not heads_first:
        return linear_recurrence(q, k, v, scale=scale, output_final_state=True, **terms)
    per_token = ("log_decay", "erase", "erase_key")
    terms = {name: x.transpose(1, 2) if name in per_token else x for name, x in terms.items()}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, state = linear_recurrence(q, k, v, scale=scale, output_final_state=True, **terms)
    return o.transpose(1, 2), state


def retention(q, k, v):
    head = torch.arange(q.shape[1])
    log_decay = torch.log1p(-(2.0 ** (-5 - head)))[None, :, None].expand(q.shape[:3])
    return recur(q, k, v, log_decay=log_decay, heads_first=True)


def delta_rule(q, k, v, beta, **terms):
    return recur(q, k, v * beta[..., None], erase=beta, **terms)


def gated_delta_rule(g, **arguments):
    return delta_rule(**arguments, log_decay=g)


def hgrn(x, g, initial_state):
    """One head with keys of one, decay on the value side."""
    one = torch.ones(*x.shape[:2], 1, 1)
    o, state = linear_recurrence(
        one,
        one,
        x[:, :, None],
        value_log_decay=g[:, :, None],
        initial_state=initial_state[:, None, None],
        output_final_state=True,
    )
    return o[:, :, 0], state[:, 0, 0]


def elementwise_hgrn(x, g, initial_state):
    one = torch.ones(1, 1)
    o, state = elementwise_recurrence(
        one,
        one,
        x[:, :, None],
        log_decay=g[:, :, None, None],
        initial_state=initial_state[:, None, None],
        output_final_state=True,
    )
    return o[:, :, 0], state[:, 0, 0]


def ttt(q, k, v, w, b, eta, initial_state, initial_state_bias):
    """The inner bias is the weights' last row, read by a one; theirs adds the layer norm of o to o."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    start = torch.cat([initial_state, initial_state_bias], 2)
    o, state = online_gradient(
        F.pad(q, (0, 1), value=1.0),
        F.pad(k, (0, 1), value=1.0),
        v - k,
        learning_rate=torch.ones(q.shape[:3], dtype=q.dtype),
        norm_weight=w,
        norm_bias=b,
        step_scale=eta,
        initial_state=torch.stack([start, start], 2),
        output_final_state=True,
    )
    o = o + F.layer_norm(o, o.shape[-1:], eps=1e-6) * w + b
    return o.transpose(1, 2), state[:, :, 1]


def normalized(features):
    def attend(q, k, v):
        q, k = features(q * q.shape[-1] ** -0.5), features(k)
        o, _ = recur(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), scale=1.0, heads_first=True)
        return (o[..., :-1] / (o[..., -1:] + 1e-6),)

    return attend


def gsa(q, k, v, s, g):
    scores, _ = recur(q, k, s, value_log_decay=g)
    return recur(scores.softmax(-1), s, v, log_decay=g, scale=1.0)


OURS = {
    "retention": retention,
    "simple_gla": lambda q, k, v, g, initial_state: recur(q, k, v, log_decay=g, initial_state=initial_state),
    "gla": lambda q, k, v, gk, initial_state: recur(q, k, v, log_decay=gk, initial_state=initial_state),
    "rwkv6": lambda q, k, v, w, u, initial_state: recur(
        q, k, v, log_decay=w, bonus=u, initial_state=initial_state, heads_first=True
    ),
    "hgrn": hgrn,
    "based": normalized(taylor_features),
    "rebased": normalized(pair_products),
    "gsa": gsa,
    "delta_rule": lambda **arguments: delta_rule(**arguments, heads_first=True),
    "gated_delta_rule": gated_delta_rule,
    "kda": gated_delta_rule,
    "ttt": ttt,
    # Theirs erases before it decays: the recurrence's e is their alpha without the decay.
    "dplr": lambda q, k, v, alpha, beta, gk, initial_state: recur(
        q, k, v, log_decay=gk, erase=-alpha * torch.exp(-gk), erase_key=beta, initial_state=initial_state,
        heads_first=True,
    ),
}  # fmt: skip


def test_every_fixture_is_used():
    assert {path.stem.removeprefix("fla_") for path in FIXTURES.glob("fla_*.safetensors")} == set(OURS)


@pytest.mark.parametrize(("name", "ours"), [*OURS.items(), ("hgrn", elementwise_hgrn)])
def test_against_naive(name, ours):
    """Theirs computes in float32, ours here in float64."""
    tensors = {key: x.double() for key, x in load_file(FIXTURES / f"fla_{name}.safetensors").items()}
    arguments = {key.removeprefix("grad_"): None for key in tensors if f"grad_{key}" in tensors}
    arguments = {key: tensors[key].requires_grad_() for key in arguments}
    outputs = [key.removeprefix("grad_of_") for key in tensors if key.startswith("grad_of_")]
    found = dict(zip(("o", "final_state"), ours(**arguments), strict=False))
    for output in outputs:
        error = (found[output] - tensors[output]).norm() / tensors[output].norm()
        assert error < 1e-5, output
    gradients = torch.autograd.grad(
        [found[output] for output in outputs], list(arguments.values()), [tensors[f"grad_of_{o}"] for o in outputs]
    )
    for argument, gradient in zip(arguments, gradients, strict=True):
        expected = tensors[f"grad_{argument}"]
        assert (gradient - expected).norm() < 1e-4 * expected.norm(), argument
