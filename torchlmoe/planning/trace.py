"""Records every operation of a step, as a dispatch mode: memory, communication and work of one rank."""

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
    """Records a computation on real tensors or, entered within a FakeTensorMode, on tensors without values.

    phase: key under which the following messages and tasks are counted.
    """

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.memory, self.communication, self.work = Memory(), Communication(ranks), Work()
        self.phase: Hashable = None
        self._is_inferring_shapes = False

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # DTensors and other subclasses are unwrapped first
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_inferring_shapes:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.memory.see(tensor)
        self.communication.see(self.phase, func, args, result)
        self.work.see(self.phase, func, args, kwargs, result)
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context every operation is recorded, and every storage that is resized in place."""
        with self, self.memory.following_resizes(), self._without_shape_inference():
            yield

    @contextmanager
    def _without_shape_inference(self) -> Iterator[None]:
        """DTensor infers an operation's shapes by running it on fake tensors of whole size, which is not work."""
        infer = ShardingPropagator._propagate_tensor_meta_non_cached

        def infer_unrecorded(*args: Any) -> Any:
            self._is_inferring_shapes = True
            try:
                return infer(*args)
            finally:
                self._is_inferring_shapes = False

        ShardingPropagator._propagate_tensor_meta_non_cached = infer_unrecorded  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            ShardingPropagator._propagate_tensor_meta_non_cached = infer  # type: ignore[method-assign]
