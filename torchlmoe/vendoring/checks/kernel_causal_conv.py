"""The kernel causal_conv: equals conv1d of each document, with its gradients."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.vendoring.checks.by_formula import DEVICE, assert_equals_formula, random_tensors


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("bounds", [[0, 20], [0, 1, 3, 3, 20]], ids=["row", "documents"])
def test_convolution_kernel(bounds, activation):
    from torchlmoe.kernels.causal_conv import causal_conv

    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE) if len(bounds) > 2 else None

    def formula(x, weight, bias):
        documents = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            if start < end:
                padded = F.pad(x[:, start:end].mT, (3, 0))
                documents.append(F.conv1d(padded, weight[:, None], bias, groups=len(weight)).mT)
        y = torch.cat(documents, 1)
        return [F.silu(y) if activation else y]

    assert_equals_formula(
        lambda x, weight, bias: [causal_conv(x, weight, bias, None, cu_seqlens, activation)],
        formula,
        random_tensors((1, 20, 5), (5, 4), (5,)),
        1e-5,
    )


def test_convolution_kernel_continues_from_a_state():
    from torchlmoe.kernels.causal_conv import causal_conv

    x, weight = (tensor.float().to(DEVICE) for tensor in random_tensors((2, 20, 5), (5, 4)))
    whole = causal_conv(x, weight, None, None, None, True)
    last = causal_conv(x[:, 12:].contiguous(), weight, None, x[:, 9:12].contiguous(), None, True)
    torch.testing.assert_close(last, whole[:, 12:])
