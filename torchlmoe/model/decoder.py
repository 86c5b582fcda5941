"""The language model: embedding, blocks in a pattern of letters, norm, output head with its loss.

It is built on the meta device and then initialized:

    with torch.device("meta"):
        model = Decoder(spec)                                                  # config.spec(vocab_size) makes one
    model.to_empty(device="cpu")
    model.init_weights(seed=0)
    logits = model(tokens)                                                     # rows of one document each
    logits = model(tokens, document_bounds)                                    # packed documents
    nll_sum = model(tokens, document_bounds, labels)                           # for training
    logits = model.next_logits(tokens, positions, cache)                       # decoding; model.init_cache makes one

Legend: B rows, T tokens in a row, V vocabulary.
"""

import copy
from collections.abc import Iterable
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.initialization import named_draws
from torchlmoe.layers.sequence import MicrobatchShare, SequenceLayout
from torchlmoe.mixers.base import Mixer, Place
from torchlmoe.model.batch import Span, describe
from torchlmoe.model.block import Block
from torchlmoe.model.head import Embedding, Head
from torchlmoe.model.spec import ModelSpec
from torchlmoe.routing.balance import RoutedLayer


class Decoder(nn.Module):
    """Linear-MoE decoder. Raises ValueError if the settings do not fit together.

    span: which part of a microbatch this rank has; see parallel/context.py.
    is_first, is_last: whether it has the first and the last block; a part of a model (`part`) may lack either.
    pipeline: the object that runs a rank's part under pipeline parallelism; see parallel/stages.py.
    counter_sizes: the number of experts or memories whose load is counted, for every routed layer of the model, by the
        prefix of its metrics' names.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec, self.span = spec, Span()
        self.is_first = self.is_last = True
        self.pipeline: object | None = None
        self.embedding = Embedding(spec.vocab_size, spec.dim, spec.init_std)
        self.embedding_norm = spec.norm() if spec.embedding_norm else None
        self.blocks = nn.ModuleDict()
        self.common = nn.ModuleDict()  # by letter
        self.shared_width = 0
        letters = [block.letter for block in spec.blocks]
        self.places_in_common = {
            str(index): (letter, letters[:index].count(letter)) for index, letter in enumerate(letters)
        }
        seen: set[type[Mixer]] = set()
        for index, block in enumerate(spec.blocks):
            mixer, place = None, Place(index, len(letters), first=block.mixer not in seen)
            if block.mixer is not None:
                seen.add(block.mixer)
                mixer = block.mixer.at(place, spec.dim, **block.mixer_options)
                self.shared_width = max(self.shared_width, mixer.shared_width)
                if (
                    self.places_in_common[str(index)][1] == 0
                    and (common := mixer.common(letters.count(block.letter))) is not None
                ):
                    self.common[block.letter] = common
            feed_forward = None
            if block.feed_forward is not None:
                feed_forward = block.feed_forward(spec.dim, **block.feed_forward_options)
            # A dict, so that a pipeline stage with some of the blocks keeps their names.
            self.blocks[str(index)] = Block(spec, mixer, feed_forward, block.residual, place)
        self.head = Head(spec)
        self.counter_sizes = {name: layer.load_balance.num_experts for name, layer in self.routed_layers().items()}

    def init_weights(self, seed: int) -> None:
        """Draws every parameter from (seed, its name), so that each way of sharding starts from the same weights."""
        with named_draws(self, seed):
            for module in (*self.ends(), *self.common.values(), *self.blocks.values()):
                module.init_weights()  # type: ignore[operator]

    def ends(self) -> list[nn.Module]:
        """Embedding, its norm and head; a model may lack the norm, and a part of a model any of them."""
        return [module for name, module in self.named_children() if name in ("embedding", "embedding_norm", "head")]

    def part(self, blocks: Iterable[int]) -> "Decoder":
        """Return a model with some of the blocks, which shares its modules with this one, under the same names.

        It has the embedding and its norm if it has the first block, and the head if it has the last one (with tied
        embeddings then also the embedding), and the modules that layers of its letters share.
        """
        names = [str(index) for index in blocks]
        letters = {self.places_in_common[name][0] for name in names}
        part = copy.copy(self)
        part.is_first, part.is_last = "0" in names, str(len(self.places_in_common) - 1) in names
        needed = {
            "embedding": part.is_first or (part.is_last and self.spec.tie_embeddings),
            "embedding_norm": part.is_first,
            "head": part.is_last,
        }
        part._modules = {name: module for name, module in self._modules.items() if needed.get(name, True)}
        part.blocks = nn.ModuleDict({name: self.blocks[name] for name in names})
        part.common = nn.ModuleDict({letter: module for letter, module in self.common.items() if letter in letters})
        return part

    def forward(
        self,
        tokens: Tensor,
        document_bounds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weight: float | None = None,
    ) -> Tensor:
        """tokens int64 [B, T] -> logits [B, T, V], or, with labels int64 [B, T], the summed loss: in
        evaluation the negative log-likelihood, in training the loss of the settings.

        document_bounds: int32 [B, max_docs + 1]: 0, then the ends of the row's documents, filled with T; each
            row is one document if None. Raises ValueError for bounds that do not rise from 0 to T in each row.
        loss_weight: the microbatch's share of the step's rows. It is the weight of the experts' balance
            losses, whose gradients are added in the backward; 1 if unset, but 0 (no balance losses) without
            labels.
        In training, tokens after a document's last label are padding: they do not count in loads, balance
        losses or capacities.

        Under context parallelism each rank receives all tokens, and returns the sum, or the logits
        [1, B * T / ranks, V], of its span of the concatenated rows.
        """
        microbatch = describe(tokens, document_bounds, labels, loss_weight, self.span, tells_padding=self.training)
        x, _ = self.run_blocks(self.embed(microbatch.tokens), microbatch.sequence)
        output = self.run_head(x, microbatch.labels)
        return output if labels is not None or not self.span.is_whole else output.view(*tokens.shape, -1)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T] -> input of the first block, [B, T, dim]."""
        x, multiplier = self.embedding(tokens), self.spec.embedding_multiplier
        x = x if multiplier == 1 else x * multiplier
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def run_blocks(
        self,
        x: Tensor,
        sequence: SequenceLayout,
        cache: TensorDict | None = None,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the blocks on x [B, T, dim], from the embedding or earlier blocks; returns the input of the head or
        later blocks.

        cache: from `init_cache`, updated in place. shared [B, T, shared_width]: see `Mixer`; it follows
            x, if a block of the model uses it.
        """
        if shared is None and self.shares:
            # Between blocks tokens may be cut into pieces, but the shared tensor is that of the whole span.
            shared = x.new_zeros(*sequence.positions.shape, self.shared_width)
        common = {letter: module() for letter, module in self.common.items()}
        for index, block in self.blocks.items():
            letter, place = self.places_in_common[index]
            context = dict(
                sequence=sequence,
                cache=None if cache is None else cache.get(index, None),
                common=common[letter][place] if letter in common else None,
            )
            if shared is None:
                x = block(x, **context)
            else:
                x, shared = block(x, **context, shared=shared)
        return x, shared

    @property
    def shares(self) -> bool:
        """Whether a block's mixer passes a tensor to later blocks."""
        return any(block.shared_width for block in self.blocks.values())  # type: ignore[union-attr]

    def run_head(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of x [B, T, dim], or the loss of labels; see `Head`."""
        return self.head(x, labels, self.embedding.weight if self.head.projection is None else None)

    def next_logits(self, tokens: Tensor, positions: Tensor, cache: TensorDict) -> Tensor:
        """Read `tokens`, which continue the text in `cache`, and return logits [B, V] of the last token of each row.

        tokens, positions: int64 [B, T]; each row is one document at its own position.
        cache: from `init_cache`, updated in place.
        """
        sequence = SequenceLayout(positions, share=MicrobatchShare(loss_weight=0.0))
        x, _ = self.run_blocks(self.embed(tokens), sequence, cache)
        return self.run_head(x[:, -1:])[:, 0]

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TensorDict:
        """Decoding state, by block, of `batch_size` rows of at most `max_length` tokens; rows can be sliced.

        Only softmax blocks need memory for each token. dtype and device are those of the model unless given.
        """
        weight = self.embedding.weight
        rows = (batch_size, max_length, dtype or weight.dtype, device or weight.device)
        caches = {index: block.init_cache(*rows) for index, block in self.blocks.items()}  # type: ignore[operator]
        return TensorDict(
            {index: cache for index, cache in caches.items() if cache is not None}, batch_size=[batch_size]
        )

    def routed_layers(self) -> dict[str, RoutedLayer]:
        """The layers whose router's load is counted and balanced, by the prefix of their metrics' names."""
        layers = {
            f"{kind}/{index}": layer
            for index, block in self.blocks.items()
            for kind, layer in (("mom", block.mixer), ("moe", block.feed_forward))
        }
        return {name: layer for name, layer in layers.items() if isinstance(layer, RoutedLayer)}

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token in a sequence of `seq_len`, recurrences and output head included."""
        blocks = sum(block.flops_per_token(seq_len) for block in self.blocks.values())  # type: ignore[operator]
        return blocks + self.head_flops_per_token()

    def head_flops_per_token(self) -> int:
        """Forward FLOPs of the output head for one token."""
        return 2 * self.spec.vocab_size * self.spec.dim


class Settings(Protocol):
    """An object with a method `spec(vocab_size)`, such as `torchlmoe.config.Config`."""

    def spec(self, vocab_size: int) -> ModelSpec: ...


def build_on_meta(config: Settings, vocab_size: int) -> Decoder:
    """Build the model without storage. `to_empty` then gives it a device and `init_weights` its values."""
    with torch.device("meta"):
        return Decoder(config.spec(vocab_size))


def count_parameters(model: Decoder, *, active: bool = False, embeddings: bool = True) -> int:
    """Number of parameters: all, or those that one token uses; with or without embedding and output head."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not embeddings:
        outer = (model.embedding, model.head.projection)
        total -= sum(module.weight.numel() for module in outer if module is not None)
    if active:
        feed_forwards = (block.feed_forward for block in model.blocks.values())
        total -= sum(layer.idle_parameters() for layer in feed_forwards if layer is not None)  # type: ignore[operator,union-attr]
    return total
