"""Counts the memory of tensors, exactly, so that every run gives the same number."""

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts the peak memory of tensors that are made within the mode, on any device, as `most` bytes.

    given: existing tensors, which are not counted.
    """

    def __init__(self, given: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.free, storage.data_ptr(), storage.nbytes())
        return result

    def free(self, pointer: int, size: int) -> None:
        self.known.discard(pointer)
        self.now -= size
