"""The recurrence with elementwise decay as a submodule, so that a context-parallel plan can name it."""

from functools import partial

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.ops.elementwise_recurrence import elementwise_recurrence, elementwise_span_summary
from torchlmoe.ops.scan_backend import check_backend
from torchlmoe.styles.recurrence import ElementwiseSequenceParallel


class ElementwiseRecurrence(nn.Module):
    """Runs `ops.elementwise_recurrence` with a fixed backend and the same signature. Looks across tokens."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        check_backend(backend)
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **terms) -> tuple[Tensor, Tensor | None]:
        return elementwise_recurrence(q, k, v, backend=self.backend, **terms)

    def context_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        return ElementwiseSequenceParallel(lsm, span_summary=partial(elementwise_span_summary, backend=self.backend))
