"""The Triton gates against torch's functions, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.kernels.gates import decay_gate
from torchlmoe.layers.biased_decay import MAX_LOG_RATE, BiasedDecay, LogSigmoidDecay
from torchlmoe.layers.decay_gate import DecayGate

FUNCTIONS = {
    "softplus": F.softplus,
    "logsigmoid": lambda z: -F.logsigmoid(z),
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
}


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def formula(x, bias, A_log, activation, rate, limits):
    step = FUNCTIONS[activation](x + bias)
    step = step.clamp(*limits) if limits else step
    if A_log is not None:
        rate = A_log.exp().repeat_interleave(x.shape[-1] // A_log.shape[0])
    return -rate * step, step


def check(device, x, bias, A_log=None, activation="softplus", rate=1.0, limits=(), with_step=True, dtype=torch.float32):
    given = {"x": x, "bias": bias} | ({} if A_log is None else {"A_log": A_log})
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    expected = formula(leaves["x"], leaves["bias"], leaves.get("A_log"), activation, rate, limits)[: 1 + with_step]
    cotangents = [randn(*x.shape, seed=8 + index) for index in range(1 + with_step)]
    expected = [*expected, *torch.autograd.grad(expected, list(leaves.values()), cotangents)]
    leaves = {name: t.to(device, dtype if name == "x" else torch.float32).requires_grad_() for name, t in given.items()}
    found = decay_gate(leaves["x"], leaves["bias"], leaves.get("A_log"), activation, rate, list(limits), with_step)
    assert found[1].shape == (x.shape if with_step else (0,))
    found = found[: 1 + with_step]
    cotangents = [cotangent.float().to(device) for cotangent in cotangents]
    found = [*found, *torch.autograd.grad(found, list(leaves.values()), cotangents)]
    names = [*("log_decay", "step")[: 1 + with_step], *given]
    for name, t, reference in zip(names, found, expected, strict=True):
        assert t.dtype is (dtype if name == "x" else torch.float32)
        limit = 1e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
        error = (t.cpu().double() - reference).norm()
        assert error <= limit * reference.norm(), f"{name}: {error / reference.norm():.1e}"


@pytest.mark.parametrize("limits", [(), (0.2, 1.5), (0.5, math.inf)])
@pytest.mark.parametrize("with_step", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 4), (1, 1, 1), (3, 40)])
def test_softplus(shape, with_step, limits, device):
    heads = shape[-1] if shape[-1] < 40 else 5
    check(device, 2 * randn(*shape), randn(shape[-1], seed=1), randn(heads, seed=2), limits=limits, with_step=with_step)


@pytest.mark.parametrize(("activation", "limits"), [("logsigmoid", ()), ("exp", (0.0, 2.0)), ("sigmoid", ())])
def test_other_activations(activation, limits, device):
    x, bias = 3 * randn(2, 20, 19), randn(19, seed=1)
    check(device, x, bias, activation=activation, rate=1 / 16, limits=limits, with_step=False)
    check(device, x, bias, randn(19, seed=2), activation=activation, limits=limits)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_every_digit_where_the_step_is_small(activation, device):
    """The step is about exp(z), or exp(-z), far below zero, and as exact there, relative to itself."""
    z = torch.linspace(-80, 80, 161, dtype=torch.float64)[:, None]
    found = decay_gate(z.float().to(device), torch.zeros(1, device=device), None, activation, 1.0, [], True)[1]
    exact = F.softplus(z, threshold=1000) if activation == "softplus" else FUNCTIONS[activation](z)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter
def test_exp_past_what_float32_holds(device):
    """Above its limit the step stands still and the gradient is zero, also where exp(z) is infinite."""
    z = torch.tensor([[-3.0], [MAX_LOG_RATE + 1], [100.0]], device=device, requires_grad=True)
    most = math.exp(MAX_LOG_RATE)
    log_decay = decay_gate(z, torch.zeros(1, device=device), None, "exp", 1.0, [0.0, most], False)[0]
    expected = torch.tensor([[math.exp(-3)], [most], [most]], device=device)
    torch.testing.assert_close(log_decay, -expected)
    for cotangent in (1.0, 0.0):
        (gradient,) = torch.autograd.grad(log_decay, z, torch.full_like(z, cotangent), retain_graph=True)
        torch.testing.assert_close(gradient, -cotangent * expected * (expected < most))


def test_refusal(device):
    with pytest.raises(ValueError, match="activation = 'relu' is none of 'softplus', 'logsigmoid', 'exp', 'sigmoid'"):
        decay_gate(torch.ones(2, 4, device=device), torch.ones(4, device=device), None, "relu", 1.0, [], False)


def test_more_rows_than_programs(device, monkeypatch):
    """A program takes several tiles, and the parameters' gradients are those of all of them."""
    monkeypatch.setattr("torchlmoe.kernels.gates.MOST_PROGRAMS", 2)
    check(device, randn(85, 6), randn(6, seed=1), randn(3, seed=2))


def test_half(device, half):
    check(device, randn(2, 9, 4).to(half).double(), randn(4, seed=1), randn(2, seed=2), dtype=half)


def test_strides_and_no_rows(device):
    wide = torch.full((2, 9, 20), torch.nan, device=device)
    x = wide[:, 1:, 2:8].copy_(randn(2, 8, 6)).detach().requires_grad_()
    log_decay = decay_gate(x, torch.zeros(6, device=device), None, "logsigmoid", 1.0, [], False)[0]
    torch.testing.assert_close(log_decay, F.logsigmoid(x))
    assert torch.isfinite(torch.autograd.grad(log_decay.sum(), x)[0]).all()
    none, bias = torch.zeros(0, 6, device=device, requires_grad=True), torch.zeros(6, device=device, requires_grad=True)
    log_decay, step = decay_gate(none, bias, bias, "softplus", 1.0, [], True)
    assert log_decay.shape == step.shape == none.shape
    assert not torch.autograd.grad((log_decay + step).sum(), bias)[0].any()


@pytest.mark.parametrize("with_step", [True, False])
def test_registered_operation(with_step, device):
    x, bias, A_log = (randn(*shape).float().to(device).requires_grad_() for shape in ((2, 3, 4), (4,), (2,)))
    torch.library.opcheck(
        torch.ops.torchlmoe.decay_gate_triton.default,
        (x, bias, A_log, "softplus", 1.0, [0.1, 0.9], with_step),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_modules_take_it(device, monkeypatch):
    """On a GPU the gates run this operation and get what they get on a CPU."""
    gates = [DecayGate(6), DecayGate(2, 3, step_limits=(2e-3, None)), DecayGate(6, step_limits=(1e-3, 5e-2))]
    decays = [LogSigmoidDecay(6), LogSigmoidDecay(6, 16.0), BiasedDecay(6, "exp"), BiasedDecay(6, "sigmoid", 0.6)]
    for module in (*gates, *decays):
        module.init_weights()

    def run(device):
        x = 3 * randn(2, 3, 6).float().to(device)
        results = [module.to(device)(x) for module in decays]
        for module in gates:
            results += module.to(device)(x)
            log_decay, nothing = module(x, with_step=False)
            assert nothing is None
            results.append(log_decay)
        return [result.cpu() for result in results]

    expected, calls = run("cpu"), []
    operation = torch.ops.torchlmoe.decay_gate_triton
    for file in ("decay_gate", "biased_decay"):
        monkeypatch.setattr(f"torchlmoe.layers.{file}.kernels_serve", lambda *_: True)
    monkeypatch.setattr("torchlmoe.kernels.gates.decay_gate", lambda *args: (calls.append(args), operation(*args))[1])
    torch.testing.assert_close(run(device), expected)
    assert len(calls) == 10
