"""What every sequence mixer is: the small protocol that the model, the trainer and the parallel styles rely on."""

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
    """Where in the model a layer stands: given to the mixers whose constructor takes a `place`.

    index: of the block, from 0. num_layers: blocks in the model. first: whether no earlier block has the same mixer.
    """

    index: int = 0
    num_layers: int = 1
    first: bool = True


class Mixer(Configurable, nn.Module):
    """x [B, T, dim] -> [B, T, dim], looking across tokens only inside its recurrence, its convolutions or `inner`.

    The keyword arguments of a mixer's constructor are its settings in `[model.layers.<letter>]`: annotate each with
    its type and, through `pydantic.Field`, its range and meaning.

    A mixer whose layers hand a tensor on, from the first of them to all later ones, sets `shared_width`: then its
    forward also takes `shared` [B, T, shared_width] and returns it, its own or the one it was given, beside y. Blocks
    with other mixers pass it along. One whose layers have parameters in common overrides `common`.

    head_dims: of the parameters that the mixer itself holds, as of every module with parameters (`layers.linear`).
    """

    init_std: float
    units: int  # how many heads, or channels, its parameters are laid in; `num_heads` of a mixer with heads
    shared_width: int = 0
    head_dims: dict[str, int] = {}
    part_of_heads: tuple[int, int] = (0, 1)  # which part of the heads this rank has, and of how many

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        """cache: what `init_cache` returned, brought up to date in place; then each row is one document, and one whose
        first position is 0 begins anew, whatever the cache holds.
        """
        raise TypeError(f"{type(self).__name__} must define forward(x, *, sequence, cache=None).")

    def init_weights(self) -> None:
        """Draws the parameters: projections normal with `init_std`, all else by its own `init_weights`."""
        _draw_children(self, self.init_std)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        """Decoding state of `batch_size` rows of at most `max_length` tokens."""
        raise TypeError(f"{type(self).__name__} must define init_cache(batch_size, max_length, dtype, device).")

    def common(self, num_layers: int) -> nn.Module | None:
        """What the `num_layers` layers of a letter have in common in the model: a module of the decoder that, called
        without arguments, returns an entry for each of them, which its forward takes as `common`. None: nothing.
        """
        return None

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token in a sequence of `seq_len`, a multiply-add counting two, recurrence included."""
        raise TypeError(f"{type(self).__name__} must define flops_per_token(seq_len).")

    def context_parallel_plan(self, lsm: str = "all_gather", attention: str = "all_gather") -> dict[str, ParallelStyle]:
        """Styles by submodule: of each one that looks across tokens, its own. Empty where there is none.

        lsm, attention: how recurrences and softmax attention communicate, as in `[parallelism]`.
        """
        return {
            name: module.context_parallel_style(lsm, attention)  # type: ignore[operator]
            for name, module in self.named_modules()
            if hasattr(module, "context_parallel_style")
        }

    @classmethod
    def at(cls, place: Place, dim: int, **options: Any) -> "Mixer":
        """The mixer, told its place if its constructor takes one."""
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
            init_weights()  # and no deeper: another mixer has drawn what it holds as it wants it
        else:
            _draw_children(child, std)


def scaled_width(dim: int, expand: float) -> int:
    """The whole number nearest to dim * expand, which seldom is one in floating point."""
    return round(dim * expand)


def split_heads(dim: int, num_heads: int, what: str = "dim") -> int:
    """dim / num_heads, or a sentence that says why not."""
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
