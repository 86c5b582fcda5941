"""The interface of sequence mixers, which the model, the trainer and the parallel styles rely on."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.initialization import constant_, normal_
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.options import Configurable


@dataclass(frozen=True)
class Place:
    """The place of a layer in the model, passed to mixers whose constructor takes a `place`.

    index: of the block, from 0. num_layers: blocks in the model. first: whether no earlier block has the same mixer.
    """

    index: int = 0
    num_layers: int = 1
    first: bool = True


class Mixer(Configurable, nn.Module):
    """x [B, T, dim] -> [B, T, dim], looking across tokens only inside its recurrence, its convolutions or `inner`.

    The keyword arguments of a mixer's constructor are its settings in `[model.layers.<letter>]`: annotate each with
    its type and, through `pydantic.Field`, its range and meaning.

    A mixer whose first layer passes a tensor to all later ones sets `shared_width`. Then its forward also takes
    `shared` [B, T, shared_width] and returns (y, shared): the first layer its own tensor, the others the one they
    received. Blocks with other mixers pass it along. A mixer whose layers share parameters overrides `common`.

    head_dims: see `layers.linear`, for the parameters that the mixer itself holds.
    """

    init_std: float
    units: int  # number of heads (or channels) of its parameters; `num_heads` for a mixer with heads
    shared_width: int = 0
    head_dims: dict[str, int] = {}
    part_of_heads: tuple[int, int] = (0, 1)  # index of this rank's part of the heads, and the number of parts

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        """cache: from `init_cache`, updated in place. With a cache each row is one document. A row whose first position
        is 0 starts a new document, and the values of its cache are ignored.
        """
        raise TypeError(f"{type(self).__name__} must define forward(x, *, sequence, cache=None).")

    def init_weights(self) -> None:
        """Draw the parameters: projections normal with `init_std`, submodules by their own `init_weights`."""
        _draw_children(self, self.init_std)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        """Decoding state of `batch_size` rows of at most `max_length` tokens."""
        raise TypeError(f"{type(self).__name__} must define init_cache(batch_size, max_length, dtype, device).")

    def common(self, num_layers: int) -> nn.Module | None:
        """A module shared by all `num_layers` layers of one letter, or None. It belongs to the decoder; called
        without arguments it returns one entry per layer, which the layer's forward takes as `common`.
        """
        return None

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token in a sequence of `seq_len`, a multiply-add counting two, recurrence included."""
        raise TypeError(f"{type(self).__name__} must define flops_per_token(seq_len).")

    def context_parallel_plan(self, lsm: str = "all_gather", attention: str = "all_gather") -> dict[str, ParallelStyle]:
        """Styles by the name of the submodule, for each submodule that looks across tokens. Empty if there is none.

        lsm, attention: how recurrences and softmax attention communicate, as in `[parallelism]`.
        """
        return {
            name: module.context_parallel_style(lsm, attention)  # type: ignore[operator]
            for name, module in self.named_modules()
            if hasattr(module, "context_parallel_style")
        }

    @classmethod
    def at(cls, place: Place, dim: int, **options: Any) -> "Mixer":
        """Construct the mixer, with its place if the constructor takes one."""
        takes_place = "place" in inspect.signature(cls).parameters
        return cls(dim, **({"place": place} if takes_place else {}), **options)  # type: ignore[call-arg]

    def projection_flops(self) -> int:
        """Forward FLOPs of one token in all projections."""
        return sum(2 * module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))


def _draw_children(module: nn.Module, std: float) -> None:
    for child in module.children():
        if isinstance(child, nn.Linear):
            normal_(child.weight, std)
            if child.bias is not None:
                constant_(child.bias, 0.0)
        elif callable(init_weights := getattr(child, "init_weights", None)):
            init_weights()  # not deeper: an inner mixer draws its own parameters
        else:
            _draw_children(child, std)


def scaled_width(dim: int, expand: float) -> int:
    """The integer nearest to dim * expand."""
    return round(dim * expand)


def split_heads(dim: int, num_heads: int, what: str = "dim") -> int:
    """dim / num_heads. Raises ValueError if it is not an integer above 0."""
    if dim == 0 or dim % num_heads:
        raise ValueError(
            f"{what} = {dim} cannot be split into num_heads = {num_heads} heads; make it a multiple of {num_heads}, "
            "above 0, or choose another num_heads."
        )
    return dim // num_heads


def recurrent_state(
    batch_size: int, num_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device | None
) -> Tensor:
    """A zero state [batch, heads, K, V] in at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    return torch.zeros(batch_size, num_heads, key_dim, value_dim, dtype=dtype, device=device)
