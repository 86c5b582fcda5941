"""The linear recurrence as a submodule, so that a context-parallel plan can name it, and how mixers run it."""

from functools import partial

from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.ops.linear_recurrence import linear_recurrence
from torchlmoe.ops.span_summary import span_summary
from torchlmoe.styles.recurrence import LSMSequenceParallel


class LinearRecurrence(nn.Module):
    """Runs `ops.linear_recurrence` with a fixed backend and the same signature. Looks across tokens."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **terms) -> tuple[Tensor, Tensor | None]:
        return linear_recurrence(q, k, v, backend=self.backend, **terms)

    def context_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        return LSMSequenceParallel(lsm, partial(span_summary, backend=self.backend))


def recur(
    recurrence: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sequence: SequenceLayout,
    cache: TensorDict | None,
    **terms,
) -> Tensor:
    """Run `recurrence` from `cache["state"]` and store the last state there; without a cache, from zero.

    A recurrence that has its own `recur` method, such as that of a mixture of memories, is run by it.
    """
    if hasattr(recurrence, "recur"):
        return recurrence.recur(q, k, v, sequence=sequence, cache=cache, **terms)  # type: ignore[operator]
    if cache is None:
        return recurrence(q, k, v, cu_seqlens=sequence.cu_seqlens, **terms)[0]
    terms |= {"initial_state": sequence.restarted(cache["state"]), "output_final_state": True}
    o, state = recurrence(q, k, v, **terms)
    cache["state"].copy_(state)
    return o
