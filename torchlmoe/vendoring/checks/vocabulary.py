"""Styles of a vocabulary: an embedding and a head whose rows are spread over ranks equal those on one process."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from torchlmoe.styles.heads import HeadParameters, read_local_parts
from torchlmoe.styles.vocabulary import VocabularyEmbedding, VocabularyHead
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, on_ranks, span_of

NUM_WORDS = 12


class Logits(nn.Module):
    """Of all words; a rank that has the weights of some asks `vocabulary` for the others."""

    vocabulary: Any = None

    def __init__(self, weight: Tensor):
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(4, dtype=torch.float64), nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(self.norm(x), self.weight)
        return logits if self.vocabulary is None else self.vocabulary.gather(logits)


def check_vocabulary(mesh: DeviceMesh) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2, NUM_WORDS, 4, dtype=torch.float64, generator=generator)
    tokens = torch.randint(NUM_WORDS, (2, 6), generator=generator)
    scores = torch.linspace(-1, 1, 2 * 6 * NUM_WORDS, dtype=torch.float64).view(2, 6, NUM_WORDS)
    results = []
    for split in (False, True):
        embedding, head = nn.Embedding(NUM_WORDS, 4, _weight=rows.clone()), Logits(weight.clone())
        if split:
            for module in (embedding, head):
                parallelize_module(module, mesh, HeadParameters({"weight": 0}))
            parallelize_module(embedding, mesh, VocabularyEmbedding())
            parallelize_module(head, mesh, VocabularyHead(NUM_WORDS))
            read_local_parts(nn.ModuleList([embedding, head]))
        x = embedding(tokens)
        logits = head(x)
        # Every rank has the logits of all tokens: each takes its share of the one loss.
        ((logits * scores).sum() / (mesh.size() if split else 1)).backward()
        gradients = [module._parameters["weight"].grad for module in (embedding, head)]  # type: ignore[union-attr]
        results.append((x, logits, gradients))
    (x, logits, expected), (x_part, logits_found, found) = results
    torch.testing.assert_close(x_part, span_of(x, mesh), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits_found, logits, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-9, atol=1e-11)  # type: ignore[union-attr]


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_vocabulary_on_ranks(world_size):
    on_ranks(world_size, check_vocabulary)
