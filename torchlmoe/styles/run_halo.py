"""Context parallelism for convolutions over the memories of documents.

Each memory of a document is a run of the tokens that chose it. The w - 1 inputs that a convolution of width w reads
before a rank's first token of a run may lie any number of ranks to the left. The last inputs of a run combine like
states: the span's own inputs, completed by received ones. Ranks gather w - 1 inputs per memory and combine them.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.styles.recurrence import Span, all_gather


class RunHalo(ParallelStyle):
    """For `RunConvolution`, whose `sequence` has `memories`. One all-gather in the forward, one reduce-scatter back."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.size() > 1:
            module.forward = partial(self.run, module, device_mesh)
        return module

    def run(self, module: Any, mesh: DeviceMesh, x: Tensor, *, sequence: Any, cache: None = None) -> Tensor:
        rank, memories = mesh.get_local_rank(), sequence.memories
        if cache is not None:
            raise ValueError("A cache holds whole rows; decode with a model that is not split over the sequence.")
        if memories.document_bounds is None:
            raise ValueError(
                "A sequence of memories can only be split over ranks if documents are packed into one row."
            )
        bounds, reach = memories.document_bounds, module.weight.shape[1] - 1
        span = Span.of_documents(bounds, rank, mesh.size(), bounds[-1] // mesh.size(), memories.cu_seqlens)
        assert span.runs is not None
        assert span.first is not None
        assert span.last is not None
        window = torch.arange(reach, device=x.device)
        length_S = (span.runs[span.last + 1] - span.runs[span.last]).clamp(max=reach)
        # The last inputs of the last document's runs, right-aligned in their windows: zeros precede a short run.
        place_SW = span.runs[span.last + 1][:, None] - reach + window
        own_SW = window >= reach - length_S[:, None]
        last_SWC = F.pad(x[0], (0, 0, 1, 0))[torch.where(own_SW, place_SW + 1, 0)]
        gathered = all_gather(torch.cat([last_SWC, own_SW[..., None].to(x.dtype)], -1), mesh)
        last_PSWC, own_PSW = gathered[..., :-1], gathered[..., -1] > 0
        # Rank 0 uses the last inputs and masks them: every rank must take part in the collective of the backward.
        seen_SWC = last_PSWC[0] if rank else last_PSWC[-1]
        for other in range(1, rank):
            shift = own_PSW[other].sum(-1, keepdim=True)  # places by which the earlier inputs move to the front
            earlier = seen_SWC.masked_fill(~span.whole_P[other], 0)
            moved = earlier.take_along_dim((window + shift).clamp(max=reach - 1)[..., None], 1)
            seen_SWC = torch.where(own_PSW[other][..., None], last_PSWC[other], moved)
        seen_SWC = seen_SWC.masked_fill(~span.continued_P[rank], 0)
        earlier = x.new_zeros(len(span.runs) - 1, *seen_SWC.shape[1:]).index_copy(0, span.first, seen_SWC)
        return module.continue_runs(x, span.runs, earlier)[0]
