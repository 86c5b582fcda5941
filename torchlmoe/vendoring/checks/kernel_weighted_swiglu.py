"""The kernel weighted_swiglu: equals its formula, with its gradients."""

import torch.nn.functional as F

from torchlmoe.vendoring.checks.by_formula import assert_equals_formula, random_tensors


def test_swiglu_kernel():
    from torchlmoe.kernels.weighted_swiglu import weighted_swiglu

    def formula(gate_up, weight):
        gate, up = gate_up.chunk(2, -1)
        return [F.silu(gate) * up * weight[:, None]]

    assert_equals_formula(lambda *tensors: [weighted_swiglu(*tensors)], formula, random_tensors((9, 40), (9,)))
