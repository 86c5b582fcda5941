"""`torch.compile` of each block: one graph, in which recurrence, attention and grouped products are operations."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from torchlmoe.model.decoder import Decoder

# Graphs of one kind of block: training and evaluation, each for one length and, once lengths vary, for all.
_GRAPHS_PER_BLOCK = 8


def compile_blocks(model: Decoder, device: torch.device) -> None:
    """Make each block run as one graph, compiled at its first call; equal blocks share a graph.

    Hooks (of FSDP) stay outside the graphs. Raises ValueError on a CPU without a C++ compiler.
    """
    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError(
                "compile.enable = true needs a C++ compiler on a CPU, and none is found; install g++ or clang++, or "
                "set it to false."
            ) from None
    # All blocks are one function to torch, which would give up at eight kinds.
    limit = _GRAPHS_PER_BLOCK * len(model.blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for block in model.blocks.values():
        compile_block(block)


def compile_block(block: nn.Module, backend: str = "inductor") -> None:
    """The block's forward is compiled at its first call. A deep copy of the block runs its own parameters."""
    block.forward = partial(_compiled(backend), block.forward)  # type: ignore[method-assign]


@cache
def _compiled(backend: str) -> Callable:
    """Compiles a call of the forward that it is given: what it is bound to is an argument, which a copy replaces."""
    return torch.compile(_call, fullgraph=True, backend=backend)


def _call(forward: Callable, *args, **kwargs):
    return forward(*args, **kwargs)
