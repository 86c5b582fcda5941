"""The kernel gated_rms_norm: equals its formula, with its gradients."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.vendoring.checks.by_formula import assert_equals_formula, random_tensors

GATES = {"none": None, "silu": F.silu, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("activation", GATES)
def test_norm_kernel(activation):
    from torchlmoe.kernels.gated_rms_norm import gated_rms_norm

    function = GATES[activation]

    def formula(x, weight, *gate):
        y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        return [y if function is None else y * function(*gate)]

    assert_equals_formula(
        lambda x, weight, gate=None: [gated_rms_norm(x, weight, gate, 1 / 24, 1e-6, activation)],
        formula,
        random_tensors((3, 7, 24), (24,), *([(3, 7, 24)] if function is not None else [])),
    )
