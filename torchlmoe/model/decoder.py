"""The language model: embedding, blocks after a pattern of letters, norm, output head with its loss.

Built on the meta device and then initialised:

    with torch.device("meta"):
        model = Decoder(config, vocab_size)
    model.to_empty(device="cpu")
    model.init_weights(seed=0)
    logits = model(tokens)                                                     # rows of one document each
    logits = model(tokens, document_bounds)                                    # packed documents
    nll_sum = model(tokens, document_bounds, labels)                           # for training
    logits = model.next_logits(tokens, positions, cache)                       # decoding; model.init_cache makes one

Legend: B rows, T tokens in a row, V vocabulary.
"""

from dataclasses import asdict, replace

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.config import Config
from torchlmoe.config_loader import layer_options
from torchlmoe.layers.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from torchlmoe.layers.initialization import named_draws, normal_
from torchlmoe.layers.linear import Linear, linear
from torchlmoe.layers.mlp import MLP
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.base import Place
from torchlmoe.mixers.mom import MixtureOfMemories
from torchlmoe.model.block import Block
from torchlmoe.moe import MoE


class Embedding(nn.Embedding):
    """tokens int64 [B, T] -> [B, T, dim]."""

    def __init__(self, vocab_size: int, dim: int, init_std: float):
        # On the meta device nn.Embedding's own draw costs nothing; init_weights sets the values.
        super().__init__(vocab_size, dim)
        self.init_std = init_std

    def init_weights(self) -> None:
        normal_(self.weight, self.init_std)


class Head(nn.Module):
    """Final norm and output projection: logits, or with labels the summed negative log-likelihood.

    With vocab_size None it has no projection and is given the embedding's weight: one parameter in one place, as FSDP
    and the meta device want it.
    """

    def __init__(self, dim: int, vocab_size: int | None, *, norm_eps: float, init_std: float, loss_chunk_size: int):
        super().__init__()
        self.init_std, self.loss_chunk_size = init_std, loss_chunk_size
        self.norm = RMSNorm(dim, norm_eps)
        self.projection = None if vocab_size is None else Linear(dim, vocab_size)

    def init_weights(self) -> None:
        self.norm.init_weights()
        if self.projection is not None:
            normal_(self.projection.weight, self.init_std)

    def forward(self, x: Tensor, labels: Tensor | None = None, tied_weight: Tensor | None = None) -> Tensor:
        """x [B, T, dim]; labels int64 [B, T], -100 where a token does not count -> logits [B, T, V] or a scalar sum."""
        x = self.norm(x)
        weight = tied_weight if self.projection is None else self.projection.weight
        assert weight is not None
        if labels is None:
            return linear(x, weight)
        return linear_cross_entropy(x.flatten(0, 1), weight, labels.flatten(), chunk_size=self.loss_chunk_size)


class Decoder(nn.Module):
    """Linear-MoE decoder. Raises ValueError where the settings do not fit together."""

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        settings = config.model
        self.embedding = Embedding(vocab_size, settings.dim, settings.init_std)
        pattern = settings.layer_pattern
        self.blocks = nn.ModuleDict()
        self.common = nn.ModuleDict()  # by letter
        self.span = (0, 1)  # which part of a microbatch this rank has, and of how many; see parallel/context.py
        self.shared_width = 0
        letters = [pattern[index % len(pattern)] for index in range(settings.num_layers)]
        self.places_in_common = {
            str(index): (letter, letters[:index].count(letter)) for index, letter in enumerate(letters)
        }
        seen: set[str] = set()
        for index, letter in enumerate(letters):
            mixer, mlp, options = layer_options(config, letter)
            feed_forward: nn.Module
            if mlp == "moe":
                feed_forward = MoE(settings.dim, init_std=settings.init_std, **asdict(config.moe))
            else:
                # 8/3 keeps the parameters of a SwiGLU those of a plain MLP of width 4.
                hidden_dim = settings.mlp_dim or 16 * max(1, round(settings.dim * 8 / 3 / 16))
                feed_forward = MLP(settings.dim, hidden_dim, init_std=settings.init_std)
            place = Place(index, settings.num_layers, first=mixer not in seen)
            seen.add(mixer)
            built = MIXERS[mixer].at(place, settings.dim, **options)
            self.shared_width = max(self.shared_width, built.shared_width)
            if letter not in letters[:index] and (common := built.common(letters.count(letter))) is not None:
                self.common[letter] = common
            # A dict, so that a pipeline stage which holds some blocks keeps their names.
            self.blocks[str(index)] = Block(settings.dim, built, feed_forward, settings.norm_eps)
        self.head = Head(
            settings.dim,
            None if settings.tie_embeddings else vocab_size,
            norm_eps=settings.norm_eps,
            init_std=settings.init_std,
            loss_chunk_size=settings.loss_chunk_size,
        )

    def init_weights(self, seed: int) -> None:
        """Draws every parameter from (seed, its name), so that each way of sharding starts from the same weights."""
        with named_draws(self, seed):
            self.embedding.init_weights()
            for module in (*self.common.values(), *self.blocks.values()):
                module.init_weights()  # type: ignore[operator]
            self.head.init_weights()

    def forward(
        self,
        tokens: Tensor,
        document_bounds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weight: float | None = None,
    ) -> Tensor:
        """tokens int64 [B, T] -> logits [B, T, V], or, with labels int64 [B, T], the summed negative log-likelihood.

        document_bounds: int32 [B, max_docs + 1], 0, then where the row's documents end, filled with T; each row is one
            document if None. Raises ValueError for bounds that do not rise from 0 to T in each row.
        loss_weight: the microbatch's share of the step's rows, by which the experts' balance losses are weighed as
            their gradients join the main loss's on the way back; 1 if unset, but 0 (none) without labels.
        In training, tokens after a document's last label are padding: they enter no load, balance loss or capacity.

        Under context parallelism each rank is given all tokens, and returns the sum, or the logits
        [1, B * T / ranks, V], of its span of the rows laid back to back.
        """
        batch_size, length = tokens.shape
        index, num_spans = self.span
        if loss_weight is None:
            loss_weight = 0.0 if labels is None else 1.0
        if tokens.numel() % num_spans:
            raise ValueError(f"{batch_size} x {length} tokens do not split into {num_spans} spans; give a multiple.")
        if document_bounds is None and num_spans > 1:
            document_bounds = torch.tensor([[0, length]], dtype=torch.int32, device=tokens.device).expand(batch_size, 2)
        if document_bounds is None:
            sequence = Sequence.of_rows(batch_size, length, tokens.device, loss_weight)
        else:
            if document_bounds.dim() == 2 and document_bounds.shape[0] != batch_size:
                raise ValueError(
                    f"document_bounds has {document_bounds.shape[0]} rows and tokens have {batch_size}; give bounds "
                    "for every row."
                )
            sequence = Sequence.of_packed_rows(document_bounds, length, loss_weight / num_spans)
        if labels is not None and self.training:
            sequence = sequence.counting(labels != IGNORE_INDEX)
        if document_bounds is not None:
            sequence = sequence.span(index, num_spans)
            tokens = tokens.reshape(1, -1).chunk(num_spans, 1)[index]
            labels = None if labels is None else labels.reshape(1, -1).chunk(num_spans, 1)[index]
        output = self._run(self.embedding(tokens), sequence, labels=labels)
        return output if labels is not None or num_spans > 1 else output.view(batch_size, length, -1)

    def next_logits(self, tokens: Tensor, positions: Tensor, cache: TensorDict) -> Tensor:
        """What comes after `tokens`, which go on where `cache` ends: logits [B, V] of the last token of each row.

        tokens, positions: int64 [B, T]; each row is one document, at a place of its own.
        cache: from `init_cache`, brought up to date in place.
        """
        return self._run(self.embedding(tokens), Sequence(positions, loss_weight=0.0), cache)[:, 0]

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TensorDict:
        """Decoding state, by block, of `batch_size` rows of at most `max_length` tokens; rows can be sliced.

        Only softmax blocks need memory for each token. dtype and device are the model's unless given.
        """
        weight = self.embedding.weight
        rows = (batch_size, max_length, dtype or weight.dtype, device or weight.device)
        caches = {index: block.mixer.init_cache(*rows) for index, block in self.blocks.items()}  # type: ignore[operator,union-attr]
        return TensorDict(caches, batch_size=[batch_size])

    def _run(
        self, x: Tensor, sequence: Sequence, cache: TensorDict | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """From embeddings to the head's output; with a cache, that of the last token of each row."""
        shared = x.new_zeros(*x.shape[:2], self.shared_width) if self.shared_width else None
        common = {letter: module() for letter, module in self.common.items()}
        for index, block in self.blocks.items():
            letter, place = self.places_in_common[index]
            told = replace(sequence, common=common[letter][place]) if letter in common else sequence
            context = dict(sequence=told, cache=None if cache is None else cache[index])
            if shared is None:
                x = block(x, **context)
            else:
                x, shared = block(x, **context, shared=shared)
        tied_weight = self.embedding.weight if self.head.projection is None else None
        return self.head(x if cache is None else x[:, -1:], labels, tied_weight)

    def moe_layers(self) -> dict[str, MoE]:
        """The mixtures of experts by the index of their block."""
        blocks = {index: block.feed_forward for index, block in self.blocks.items()}
        return {index: layer for index, layer in blocks.items() if isinstance(layer, MoE)}

    def routed_layers(self) -> dict[str, MoE | MixtureOfMemories]:
        """The layers whose router's load is counted and balanced, by the first part of their figures' names."""
        layers = {
            f"{kind}/{index}": layer
            for index, block in self.blocks.items()
            for kind, layer in (("mom", block.mixer), ("moe", block.feed_forward))
        }
        return {name: layer for name, layer in layers.items() if isinstance(layer, (MoE, MixtureOfMemories))}

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token in a sequence of `seq_len`, recurrences and output head included."""
        blocks = sum(block.flops_per_token(seq_len) for block in self.blocks.values())  # type: ignore[operator]
        return blocks + 2 * self.embedding.weight.numel()


def build_on_meta(config: Config, vocab_size: int) -> Decoder:
    """The model without storage, to be counted, cut, or given a device by `to_empty` and values by `init_weights`."""
    with torch.device("meta"):
        return Decoder(config, vocab_size)


def count_parameters(model: Decoder, *, active: bool = False, embeddings: bool = True) -> int:
    """Parameters, of the whole model or of those that one token meets; with or without embedding and output head."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not embeddings:
        outer = (model.embedding, model.head.projection)
        total -= sum(module.weight.numel() for module in outer if module is not None)
    if active:
        for layer in model.moe_layers().values():
            routed = sum(parameter.numel() for parameter in layer.experts.parameters())
            total -= routed // layer.num_experts * (layer.num_experts - layer.router.top_k)
    return total
