"""A mode in which every operation of a step is seen: memory, communication and work of one rank."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchlmoe.parallel.ranks import Ranks
from torchlmoe.planning.communication import Communication
from torchlmoe.planning.memory import Memory
from torchlmoe.planning.work import Work

_PLAIN = (Tensor, Parameter, FakeTensor)


class Trace(TorchDispatchMode):
    """Sees a computation on real tensors or, entered within a FakeTensorMode, on tensors without values.

    phase: by which messages and tasks are counted from now on.
    """

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.memory, self.communication, self.work = Memory(), Communication(ranks), Work()
        self.phase: Hashable = None

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # DTensors and others first become what they are made of
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.memory.see(tensor)
        self.communication.see(self.phase, func, args, result)
        self.work.see(self.phase, func, args, kwargs, result)
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it all is seen, storages that are resized in place included."""
        with self, self.memory.following_resizes():
            yield
