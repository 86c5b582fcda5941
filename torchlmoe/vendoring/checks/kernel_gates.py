"""The kernel decay_gate: equals its formula, with its gradients."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.vendoring.checks.by_formula import assert_equals_formula, random_tensors

STEPS = {"softplus": F.softplus, "logsigmoid": lambda z: -F.logsigmoid(z), "exp": torch.exp, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("activation", STEPS)
@pytest.mark.parametrize("limits", [[], [0.3, 1.5]], ids=["free", "clamped"])
def test_gate_kernel(activation, limits):
    from torchlmoe.kernels.gates import decay_gate

    def formula(x, bias, A_log):
        step = STEPS[activation](x + bias)
        step = step.clamp(*limits) if limits else step
        return [-A_log.exp().repeat_interleave(5) * step, step]

    assert_equals_formula(
        lambda x, bias, A_log: decay_gate(x, bias, A_log, activation, 1.0, limits, True),
        formula,
        random_tensors((2, 9, 10), (10,), (2,)),
    )
