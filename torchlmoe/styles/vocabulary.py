"""Tensor parallelism for embedding and output head: the vocabulary is split over ranks.

Each of P ranks has a contiguous part of the rows of the embedding, or of the output weight. The embedding of a token
comes from the rank that has its row: one reduce-scatter leaves each rank with its own tokens. The head gathers its
input. Logits stay split, and a loss exchanges two or three numbers per token. The file needs only torch.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.styles.heads import gather_tokens, scatter_sums


class VocabularyPart:
    """This rank's part of a vocabulary of `vocab_size` rows, which begins at row `start`, and sums over all parts."""

    def __init__(self, mesh: DeviceMesh, vocab_size: int):
        self.mesh, self.vocab_size = mesh, vocab_size
        self.start = mesh.get_local_rank() * -(-vocab_size // mesh.size())

    def own(self, token: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """token int64 -> its row in this part (0 if it is in another), and whether it is in this part, bool.

        num_rows: number of rows in this part.
        """
        row = token - self.start
        is_own = (row >= 0) & (row < num_rows)
        return row.where(is_own, 0), is_own

    def total(self, x: Tensor, operation: str = "sum") -> Tensor:
        """Reduce x over ranks. operation: "sum" or "max". Not differentiable."""
        return wait_tensor(all_reduce(x, operation, self.mesh))

    def gather(self, logits: Tensor) -> Tensor:
        """This rank's [..., V / P] -> [..., V] on every rank, all of which must compute the same loss from it."""
        shape = torch.Size([*logits.shape[:-1], self.vocab_size])
        stride = torch.empty(shape, device="meta").stride()
        part = DTensor.from_local(
            logits.contiguous(), self.mesh, [Shard(logits.dim() - 1)], run_check=False, shape=shape, stride=stride
        )
        return part.redistribute(placements=[Replicate()]).to_local()


class VocabularyEmbedding(ParallelStyle):
    """For an `nn.Embedding` split by rows: all tokens [B, L] -> embeddings of the rank's own tokens [B, L / P, dim]."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        vocabulary = VocabularyPart(device_mesh, module.num_embeddings)
        module.forward = partial(_embed, module, vocabulary)  # type: ignore[method-assign]
        return module


def _embed(module: nn.Embedding, vocabulary: VocabularyPart, tokens: Tensor) -> Tensor:
    weight = module.weight
    row, is_own = vocabulary.own(tokens, weight.shape[0])
    x = torch.nn.functional.embedding(row, weight).masked_fill(~is_own[..., None], 0)
    return scatter_sums(x, vocabulary.mesh)


class VocabularyHead(ParallelStyle):
    """For a head with `forward(x, labels, tied_weight)`, a `norm` before its projection, and an attribute `vocabulary`.

    x has the rank's own tokens, labels those of all ranks. vocab_size: number of rows of the whole output weight.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.vocabulary = VocabularyPart(device_mesh, self.vocab_size)  # type: ignore[assignment]
        norm: Any = module.norm
        norm.register_forward_hook(lambda norm, inputs, y: gather_tokens(y, device_mesh))
        return module
