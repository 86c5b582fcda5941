"""Invertible steps on a list of tensors: split, flatten, reorder, permute, add a constant.

`forward` converts from another format to torchlmoe, and `backward` is its inverse. `step.inverse` exchanges the two, so
`Split(...).inverse` concatenates tensors. Tensors may have any dtype and device, meta included. Nothing is copied if a
view is possible: by a split without groups, a permutation, and a flatten of contiguous tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Misfit(ValueError):
    """The tensor at place `index` of a step's list does not fit. `need` completes the sentence "Tensor 0 must ..."."""

    def __init__(self, index: int, need: str, remedy: str = "check the sizes that the table was made with"):
        super().__init__(f"Tensor {index} must {need}: {remedy}.")
        self.index, self.need, self.remedy = index, need, remedy


class Step(ABC):
    """num_before, num_after: number of tensors that `forward` takes and returns. None: any number, unchanged."""

    num_before: int | None = None
    num_after: int | None = None

    @abstractmethod
    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Convert tensors of the other format. Raises Misfit for a tensor whose shape does not fit."""

    @abstractmethod
    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `forward`."""

    @property
    def inverse(self) -> Step:
        return _Inverse(self)


class _Inverse(Step):
    def __init__(self, step: Step):
        self.num_before, self.num_after = step.num_after, step.num_before
        self.step = step

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.step.backward(tensors)

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.step.forward(tensors)

    @property
    def inverse(self) -> Step:
        return self.step

    def __repr__(self) -> str:
        return f"{self.step}.inverse"


@dataclass(frozen=True)
class Split(Step):
    """One tensor -> its parts along `dim`. The dim consists of `groups` equal groups, and each group has all parts.

    sizes: the size of each part within a group, or the number of equal parts. With two groups, sizes (1, 2) split the
    entries [a0, b0, c0, a1, b1, c1] into [a0, a1] and [b0, c0, b1, c1].
    """

    sizes: tuple[int, ...] | int
    groups: int = 1
    dim: int = 0

    def __post_init__(self) -> None:
        for number in (self.groups, *((self.sizes,) if isinstance(self.sizes, int) else self.sizes)):
            if number < 1:
                raise ValueError(f"{self} holds {number}: groups and sizes must be at least 1.")

    @property
    def num_before(self) -> int:  # type: ignore[override]
        return 1

    @property
    def num_after(self) -> int:  # type: ignore[override]
        return self.sizes if isinstance(self.sizes, int) else len(self.sizes)

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        size, dim = _size(0, whole, self.dim), self.dim
        if isinstance(self.sizes, int):
            _check_multiple(0, size, self.groups * self.sizes, dim)
            sizes = [size // (self.groups * self.sizes)] * self.sizes
        else:
            sizes = list(self.sizes)
            if size != self.groups * sum(sizes):
                parts = " + ".join(map(str, sizes))
                raise Misfit(
                    0, f"have {self.groups * sum(sizes)} entries in dim {dim} ({self.groups} x ({parts})), not {size}"
                )
        return [part.flatten(dim, dim + 1) for part in whole.unflatten(dim, (self.groups, -1)).split(sizes, dim + 1)]

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        dim, first = self.dim, tensors[0]
        for index, part in enumerate(tensors):
            size = _size(index, part, dim)
            if isinstance(self.sizes, int):
                _check_multiple(index, size, self.groups, dim)
                expected = first.shape[dim]
            else:
                expected = self.groups * self.sizes[index]
            shape = (*first.shape[:dim], expected, *first.shape[dim + 1 :])
            if part.shape != shape:
                raise Misfit(index, f"have the shape {list(shape)}, not {list(part.shape)}")
            # `torch.cat` would convert silently, and the inverse would give another dtype.
            if (part.dtype, part.device) != (first.dtype, first.device):
                like, found = (f"{x.dtype} on {x.device}" for x in (first, part))
                raise Misfit(index, f"be {like}, like the tensor it is joined with, not {found}", "convert it first")
        grouped = [part.unflatten(dim, (self.groups, -1)) for part in tensors]
        return [torch.cat(grouped, dim + 1).flatten(dim, dim + 1)]


@dataclass(frozen=True)
class Flatten(Step):
    """Each tensor -> the same with len(sizes) dims, from `dim`, flattened to one. One of the sizes may be -1: any."""

    sizes: tuple[int, ...]
    dim: int = 0

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        end = self.dim + len(self.sizes)
        for index, x in enumerate(tensors):
            found = x.shape[self.dim : end]
            fits = all(size in (-1, other) for size, other in zip(self.sizes, found, strict=False))
            if len(found) < len(self.sizes) or not fits:
                sizes = ["any" if size == -1 else size for size in self.sizes]
                need = f"have dims {self.dim} to {end - 1} of sizes {', '.join(map(str, sizes))}"
                raise Misfit(index, f"{need}, not the shape {list(x.shape)}")
        return [x.flatten(self.dim, end - 1) for x in tensors]

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        known = 1
        for size in self.sizes:
            known *= 1 if size == -1 else size
        for index, x in enumerate(tensors):
            size = _size(index, x, self.dim)
            if -1 in self.sizes:
                _check_multiple(index, size, known, self.dim)
            elif size != known:
                raise Misfit(index, f"have {known} entries in dim {self.dim}, not {size}")
        return [x.unflatten(self.dim, self.sizes) for x in tensors]


@dataclass(frozen=True)
class Reorder(Step):
    """Each tensor -> the same with every group of len(order) entries along `dim` reordered: new i is old order[i]."""

    order: tuple[int, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        _check_permutation(self.order)

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._select(tensors, self.order)

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._select(tensors, _inverted(self.order))

    def _select(self, tensors: Sequence[Tensor], order: Sequence[int]) -> list[Tensor]:
        for index, x in enumerate(tensors):
            _check_multiple(index, _size(index, x, self.dim), len(order), self.dim)
        dim = self.dim
        return [
            x.unflatten(dim, (-1, len(order)))
            .index_select(dim + 1, torch.tensor(order, device=x.device))
            .flatten(dim, dim + 1)
            for x in tensors
        ]


@dataclass(frozen=True)
class Permute(Step):
    """Each tensor -> `tensor.permute(dims)`."""

    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_permutation(self.dims)

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._permute(tensors, self.dims)

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._permute(tensors, _inverted(self.dims))

    def _permute(self, tensors: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
        for index, x in enumerate(tensors):
            if x.ndim != len(dims):
                raise Misfit(index, f"have {len(dims)} dims, not the shape {list(x.shape)}")
        return [x.permute(*dims) for x in tensors]


@dataclass(frozen=True)
class Add(Step):
    """Each tensor -> tensor + constant, in at least float32 in both directions, since bfloat16 would round the sum.

    A number far below the constant loses digits, as it does in a layer that computes the same sum in float32.
    """

    constant: float

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.to(torch.promote_types(x.dtype, torch.float32)) + self.constant for x in tensors]

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.to(torch.promote_types(x.dtype, torch.float32)) - self.constant for x in tensors]


def _size(index: int, x: Tensor, dim: int) -> int:
    if dim >= x.ndim:
        raise Misfit(index, f"have a dim {dim}, not the shape {list(x.shape)}")
    return x.shape[dim]


def _check_multiple(index: int, size: int, factor: int, dim: int) -> None:
    if size % factor:
        raise Misfit(index, f"have a multiple of {factor} entries in dim {dim}, not {size}")


def _check_permutation(order: tuple[int, ...]) -> None:
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"{order} must hold each number from 0 to {len(order) - 1} once.")


def _inverted(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
