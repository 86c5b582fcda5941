"""Online gradient descent as a submodule, so that a context-parallel plan can name it."""

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.ops.online_gradient import online_gradient
from torchlmoe.ops.scan_backend import check_backend
from torchlmoe.styles.recurrence import StateRing


class OnlineGradient(nn.Module):
    """Runs `ops.online_gradient` with a fixed backend and the same signature. Looks across tokens."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        check_backend(backend, "online_gradient")
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **terms) -> tuple[Tensor, Tensor | None]:
        return online_gradient(q, k, v, backend=self.backend, **terms)

    def context_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        """Always the ring, since the state is not an affine map of its predecessor."""
        return StateRing()
