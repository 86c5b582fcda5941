"""What the checks of kernels share: a kernel in float32, on a GPU or in Triton's interpreter, beside a formula."""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's file is imported, which is why tests do that themselves


def assert_equals_formula(
    kernel: Callable[..., Sequence[Tensor]],
    formula: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    tolerance: float = 1e-6,
) -> None:
    """All results, and the gradients of the tensors for random gradients of the results.

    tensors: float64, on the CPU, which is how the formula gets them. tolerance: of each result's norm.
    """
    results = []
    for function, dtype, device in ((kernel, torch.float32, DEVICE), (formula, torch.float64, "cpu")):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in tensors]
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for place, (found, expected) in enumerate(zip(*results, strict=True)):
        error = (found.cpu().double() - expected).norm()
        assert error <= tolerance * expected.norm(), f"result {place}: {error / expected.norm():.1e} of its norm"


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
