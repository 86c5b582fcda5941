"""Losses by name: output projection and loss together.

A loss is a function (hidden [T, D], weight [V, D], labels int64 [T], *, chunk_size, ...) -> the sum over the tokens
whose label is not -100, in at least float32. Its other annotated keyword arguments are settings,
`training.loss_options`. A loss that takes `vocabulary`, as `linear_cross_entropy` does, also works under tensor
parallelism.
"""

from collections.abc import Callable

from torch import Tensor

from torchlmoe.layers.cross_entropy import linear_cross_entropy
from torchlmoe.registry import Registry

LOSSES: Registry[Callable[..., Tensor]] = Registry("Loss", {"cross_entropy": linear_cross_entropy})
OF_THE_HEAD = ("chunk_size", "vocabulary")  # arguments that the model's head passes; they are not settings
