"""A mode in which every operation of a step is seen: memory, communication and work of one rank."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
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
        self._is_asked = False

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # DTensors and others first become what they are made of
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_asked:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.memory.see(tensor)
        self.communication.see(self.phase, func, args, result)
        self.work.see(self.phase, func, args, kwargs, result)
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it all is seen, storages that are resized in place included."""
        with self, self.memory.following_resizes(), self._without_questions():
            yield

    @contextmanager
    def _without_questions(self) -> Iterator[None]:
        """DTensor asks for an operation's shapes by running it on fake tensors of whole size, which is no work."""
        ask = ShardingPropagator._propagate_tensor_meta_non_cached

        def asked(*args: Any) -> Any:
            self._is_asked = True
            try:
                return ask(*args)
            finally:
                self._is_asked = False

        ShardingPropagator._propagate_tensor_meta_non_cached = asked  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            ShardingPropagator._propagate_tensor_meta_non_cached = ask  # type: ignore[method-assign]
