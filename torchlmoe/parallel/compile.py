"""Compiles each block into one graph, in which recurrence, attention and grouped products are custom operations."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from torchlmoe.model.decoder import Decoder

# Graphs per kind of block: for training and evaluation, with a static length and, once lengths vary, a dynamic one.
_GRAPHS_PER_BLOCK = 8


def compile_blocks(model: Decoder, device: torch.device) -> None:
    """Makes each block run as one graph, compiled at its first call. Equal blocks share a graph.

    FSDP's hooks stay outside the graphs. Raises ValueError on a CPU without a C++ compiler.
    """
    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError(
                "compile.enable = true needs a C++ compiler on a CPU, and none is found; install g++ or clang++, or "
                "set it to false."
            ) from None
    # All blocks call one compiled function, which torch by default recompiles at most eight times.
    limit = _GRAPHS_PER_BLOCK * len(model.blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for block in model.blocks.values():
        compile_block(block)


def compile_block(block: nn.Module, backend: str = "inductor") -> None:
    """Compiles the block's forward at its first call. A deep copy of the block uses its own parameters."""
    block.forward = partial(_compiled(backend), block.forward)  # type: ignore[method-assign]


@cache
def _compiled(backend: str) -> Callable:
    """The compiled `_call`. The bound forward is an argument, so that a deep copy of a block replaces it."""
    return torch.compile(_call, fullgraph=True, backend=backend)


def _call(forward: Callable, *args, **kwargs):
    return forward(*args, **kwargs)
