"""The layers before and after the blocks: the embedding, and the norm and output projection with its loss."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchlmoe.layers.cross_entropy import linear_cross_entropy
from torchlmoe.layers.initialization import normal_
from torchlmoe.layers.linear import ColumnLinear, linear
from torchlmoe.model.spec import ModelSpec
from torchlmoe.styles.vocabulary import VocabularyPart


class Embedding(nn.Embedding):
    """tokens int64 [B, T] -> [B, T, dim]."""

    head_dims = {"weight": 0}  # a rank may have a part of the vocabulary

    def __init__(self, vocab_size: int, dim: int, init_std: float):
        # On the meta device nn.Embedding's own draw costs nothing; init_weights sets the values.
        super().__init__(vocab_size, dim)
        self.init_std = init_std

    def init_weights(self) -> None:
        normal_(self.weight, self.init_std)


class Head(nn.Module):
    """Final norm and output projection: logits, or with labels the loss, summed over tokens.

    In training the loss is that of the settings; in evaluation it is cross entropy, the negative log-likelihood.
    With tied embeddings there is no projection, and forward receives the embedding's weight: FSDP and the meta
    device need a parameter to be registered once.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.init_std, self.loss_chunk_size = spec.init_std, spec.loss_chunk_size
        self.loss: Callable[..., Tensor] = spec.loss
        self.logit_divisor = spec.logit_divisor
        self.vocabulary: VocabularyPart | None = None  # set if ranks have parts of it
        self.norm = spec.norm()
        self.projection = None if spec.tie_embeddings else ColumnLinear(spec.dim, spec.vocab_size)

    def init_weights(self) -> None:
        self.norm.init_weights()
        if self.projection is not None:
            normal_(self.projection.weight, self.init_std)

    def forward(self, x: Tensor, labels: Tensor | None = None, tied_weight: Tensor | None = None) -> Tensor:
        """x [B, T, dim]; labels int64 [B, T], -100 for tokens that do not count -> logits [B, T, V] or a scalar sum."""
        x = self.norm(x)
        if self.logit_divisor != 1:  # divides the projection's input, so that every loss gets the divided logits
            x = x / self.logit_divisor
        weight = tied_weight if self.projection is None else self.projection.weight
        assert weight is not None
        if labels is None:
            logits = linear(x, weight)
            return logits if self.vocabulary is None else self.vocabulary.gather(logits)
        options: dict[str, Any] = {"chunk_size": self.loss_chunk_size}
        if self.vocabulary is not None:
            options["vocabulary"] = self.vocabulary
        loss = self.loss if self.training else linear_cross_entropy
        return loss(x.flatten(0, 1), weight, labels.flatten(), **options)
