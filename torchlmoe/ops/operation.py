"""Common behavior of this package's operations under autocast and unsupported transforms of torch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the public function of an operation so that it runs as if autocast were off.

    The wrapper raises RuntimeError under `torch.func` transforms and forward-mode derivatives, which custom operations
    do not have, unless the function is called with backend = "reference".
    """
    has_reference = "backend" in function.__kwdefaults__ if function.__kwdefaults__ else False

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if kwargs.get("backend") != "reference" and not torch.compiler.is_compiling():
            _refuse_transforms(function.__name__, has_reference, tensors)
        with without_autocast(tensors):
            return function(*args, **kwargs)

    return run


def custom_op(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Like `torch.library.custom_op` without mutated arguments; the body runs as if autocast were off, which matters
    when `backward()` is called under autocast."""

    def register(body: Callable[..., Any]) -> Any:
        @wraps(body)
        def run(*args: Any) -> Any:
            with without_autocast([x for x in args if isinstance(x, Tensor)]):
                return body(*args)

        return torch.library.custom_op(name, run, mutates_args=(), schema=schema)

    return register


def keep_for_backward(ctx: Any, outputs: Sequence[Tensor], kept: Tensor) -> None:
    """In `setup_context`: `kept` is only for the backward, to which torch then hands no zeros in place of gradients."""
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.like_outputs = [(x.shape, x.dtype, x.device) for x in outputs]


def gradients_of(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """grads: of all outputs, `kept` last -> those of the differentiable ones, zeros where autograd has none."""
    pairs = zip(grads[:-1], ctx.like_outputs, strict=True)
    return [torch.zeros(shape, dtype=dtype, device=device) if x is None else x for x, (shape, dtype, device) in pairs]


def without_autocast(tensors: list[Tensor]) -> AbstractContextManager:
    device = tensors[0].device.type if tensors else "cpu"
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _refuse_transforms(name: str, has_reference: bool, tensors: list[Tensor]) -> None:
    in_forward_mode = forward_ad._current_level >= 0
    for x in tensors:
        if torch._C._functorch.is_functorch_wrapped_tensor(x) or (
            in_forward_mode and forward_ad.unpack_dual(x).tangent is not None
        ):
            remedy = (
                'call it with backend = "reference", which is made of plain torch operations'
                if has_reference
                else "use reverse-mode autograd, backward() or torch.autograd.grad"
            )
            raise RuntimeError(
                f"{name} supports no forward-mode derivative and no torch.func transform (grad, vmap, jvp); {remedy}."
            )


def data_dependent_size(estimate: Callable[[], int]) -> int:
    """For the fake implementation of an operation: a size that depends on values.

    It is a new symbol under `torch.compile` and `torch.export`. Without symbols it is the estimate: on the
    meta device, and in a FakeTensorMode without a shape environment.
    """
    try:
        return torch.library.get_ctx().new_dynamic_size()  # type: ignore[return-value]  # a SymInt
    except RuntimeError:
        return estimate()


def size_by_documents(
    count: Callable[[tuple[int, ...] | None], int], v: Tensor, cu_seqlens: Tensor | None, known: bool = True
) -> int:
    """For a fake implementation: count(bounds), a size that depends on how v's tokens are cut into documents.

    known: whether it depends on nothing else. If bounds have no values, the estimate assumes equal documents.
    """
    if known and cu_seqlens is None and all(type(size) is int for size in v.shape):
        return count(None)

    def estimate() -> int:
        if cu_seqlens is None:
            return count(None)
        length, num_documents = v.shape[1], max(1, cu_seqlens.shape[0] - 1)
        return count(tuple(length * document // num_documents for document in range(num_documents + 1)))

    return data_dependent_size(estimate)
