"""Records the memory of a computation over time, from the lifetimes of its tensors' storages."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Memory:
    """Bytes of every recorded storage, from its first use until it is freed. Tensors may be real, fake or on meta.

    Memory that a kernel allocates and frees internally is not recorded.
    """

    def __init__(self) -> None:
        self._number_of: dict[int, int] = {}  # address of a live storage -> its number
        self._bytes: list[int] = []  # by number: the current size, zero once the storage is freed
        self._changes: list[tuple[int, int]] = []  # (number, change in bytes), in order

    def see(self, tensor: Tensor) -> int:
        """Record the tensor's storage, and return its number."""
        return self._see_storage(tensor.untyped_storage())

    def numbers(self, tensors: Iterable[Tensor]) -> Set[int]:
        """Record the storages of tensors (for a DTensor, of its local part), and return their numbers."""
        return {self.see(part) for tensor in tensors for part in local_parts(tensor)}

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Current bytes of the tensors' storages together, each counted once."""
        return sum(self._bytes[number] for number in self.numbers(tensors))

    def peak(self, without: Set[int] = frozenset()) -> int:
        """The most bytes that were allocated at once. without: numbers of storages that are not counted."""
        now = most = 0
        for number, change in self._changes:
            if number not in without:
                now += change
                most = max(most, now)
        return most

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Within the context, storages that are resized in place are recorded: FSDP so frees gathered parameters."""
        resize: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize_recorded(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            self._see_storage(storage)
            return resized

        torch.UntypedStorage.resize_ = resize_recorded  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def _see_storage(self, storage: torch.UntypedStorage) -> int:
        address, size = storage._cdata, storage.nbytes()
        number = self._number_of.get(address)
        if number is None:
            number = self._number_of[address] = len(self._bytes)
            self._bytes.append(0)
            weakref.finalize(storage, self._freed, address, number).atexit = False
        if size != self._bytes[number]:
            self._changes.append((number, size - self._bytes[number]))
            self._bytes[number] = size
        return number

    def _freed(self, address: int, number: int) -> None:
        del self._number_of[address]
        self._changes.append((number, -self._bytes[number]))
        self._bytes[number] = 0


def local_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of this rank that `tensor` consists of."""
    return [tensor.to_local()] if isinstance(tensor, DTensor) else [tensor]
