"""Embedding and output head with a vocabulary that is split over ranks, which have the same tokens between them.

Each of P ranks has a contiguous part of the rows of the embedding, or of the output weight. The embedding of a token
comes from the rank that has its row: one reduce-scatter leaves each rank with its own tokens. The head gathers its
input; logits stay split, and a loss exchanges two or three numbers per token. The file needs torch alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.styles.heads import gather_tokens, scatter_sums


class VocabularyPart:
    """The rows from `start` on that this rank has of `vocab_size`, and sums over the ranks that have the others."""

    def __init__(self, mesh: DeviceMesh, vocab_size: int):
        self.mesh = mesh
        self.start = min(mesh.get_local_rank() * -(-vocab_size // mesh.size()), vocab_size)

    def own(self, token: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """token int64 -> its row here, 0 if it is elsewhere, and whether it is here. num_rows: that this rank has."""
        row = token - self.start
        is_own = (row >= 0) & (row < num_rows)
        return row.where(is_own, 0), is_own

    def total(self, x: Tensor, operation: str = "sum") -> Tensor:
        """Over ranks; "sum" or "max". Not differentiable."""
        return wait_tensor(all_reduce(x, operation, self.mesh))

    def gather(self, logits: Tensor) -> Tensor:
        """[..., V / P] -> [..., V]."""
        sharded = DTensor.from_local(logits, self.mesh, [Shard(logits.dim() - 1)], run_check=False)
        return sharded.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


class VocabularyEmbedding(ParallelStyle):
    """For an `nn.Embedding` split by rows: tokens [B, L] of all ranks -> those of the rank itself [B, L / P, dim]."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        vocabulary = VocabularyPart(device_mesh, module.num_embeddings)
        module.forward = partial(_embed, module, vocabulary)  # type: ignore[method-assign]
        return module


def _embed(module: nn.Embedding, vocabulary: VocabularyPart, tokens: Tensor) -> Tensor:
    weight = module.weight
    row, is_own = vocabulary.own(tokens, weight.shape[0])
    if not weight.shape[0]:  # a rank beyond the last row
        x = weight.sum() + weight.new_zeros(*tokens.shape, weight.shape[1])
    else:
        x = torch.nn.functional.embedding(row, weight).masked_fill(~is_own[..., None], 0)
    return scatter_sums(x, vocabulary.mesh)


class VocabularyHead(ParallelStyle):
    """For a head with `forward(x, labels, tied_weight)`, a `norm` before its projection, and an attribute `vocabulary`.

    x is the rank's own tokens; labels are those of all ranks. vocab_size: rows of the output weight in all.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.vocabulary = VocabularyPart(device_mesh, self.vocab_size)  # type: ignore[assignment]
        norm: Any = module.norm
        norm.register_forward_hook(lambda norm, inputs, y: gather_tokens(y, device_mesh))
        return module
