"""Assumptions about tensors without values, in a FakeTensorMode outside `torch.compile`, as in the planner."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(x: Tensor) -> bool:
    """Whether values can be read from x. `torch.compile` reads them as symbols."""
    return torch.compiler.is_compiling() or not isinstance(x, FakeTensor)


def equal_documents(length: int, cu_seqlens: Tensor) -> list[int]:
    """Bounds of as many documents as cu_seqlens has, all of about equal length."""
    num_documents = max(1, cu_seqlens.shape[0] - 1)
    return [length * document // num_documents for document in range(num_documents + 1)]
