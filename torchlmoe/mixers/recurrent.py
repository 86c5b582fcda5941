"""Base of mixers around one linear recurrence: projections, short convolutions, cache and FLOPs."""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.linear import ColumnLinear, RowLinear
from torchlmoe.layers.recurrence import LinearRecurrence
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.short_convolution import ShortConvolution
from torchlmoe.mixers.base import Mixer, recurrent_state, split_heads
from torchlmoe.ops.linear_recurrence import Backend, recurrence_flops_per_token
from torchlmoe.options import InitStd


class RecurrentMixer(Mixer):
    """Heads of q, k and v by projection, one recurrence with a state [key_dim, value_dim] per head, output projection.

    key_width, value_width: of all heads of k and v together. recurrence: constructs it from a backend. A subclass
    changes key_dim or value_dim if its feature map does, and sets `decays` and `erases` if its recurrence has these
    terms. Its constructor passes `**options` on, so that the keyword arguments here are settings of every such mixer.
    """

    decays = False
    erases = False
    shares_qk = False  # whether q and k are one projection

    def __init__(
        self,
        dim: int,
        key_width: int,
        value_width: int,
        num_key_heads: int | None = None,
        recurrence: Callable[[str], nn.Module] = LinearRecurrence,
        proj_bias: bool = False,
        *,
        num_heads: Annotated[int, Field(ge=1, description="Heads; value heads if heads share keys.")],
        backend: Backend = "auto",
        init_std: InitStd = 0.02,
    ):
        super().__init__()
        num_key_heads = num_key_heads or num_heads
        if num_heads % num_key_heads:
            raise ValueError(f"num_heads = {num_heads} must be a multiple of num_key_heads = {num_key_heads}.")
        self.num_heads = self.units = num_heads
        self.num_key_heads, self.init_std = num_key_heads, init_std
        self.key_dim = split_heads(key_width, num_key_heads, "dim" if key_width == dim else "the width of all keys")
        self.value_dim = split_heads(value_width, num_heads, "dim" if value_width == dim else "the width of all values")
        self.head_widths = (self.key_dim, self.value_dim)  # before a feature map
        self.q_proj = ColumnLinear(dim, key_width, proj_bias, units=num_key_heads)
        if not self.shares_qk:
            self.k_proj = ColumnLinear(dim, key_width, proj_bias, units=num_key_heads)
        self.v_proj = ColumnLinear(dim, value_width, proj_bias)
        self.backend, self.recurrence = backend, recurrence(backend)
        self.o_proj = RowLinear(value_width, dim, bias=proj_bias)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        """`state` [batch, num_heads, key_dim, value_dim] in at least float32, and caches of convolution and shift."""
        state = recurrent_state(batch_size, self.num_heads, self.key_dim, self.value_dim, dtype, device)
        caches = {
            name: child.init_cache(batch_size, dtype, device)  # type: ignore[operator]
            for name, child in self.named_children()
            if hasattr(child, "init_cache")
        }
        return TensorDict({"state": state, **caches}, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        return self.projection_flops() + self.convolution_flops() + self.recurrence_flops()

    def convolution_flops(self) -> int:
        """Forward FLOPs of one token in the short convolutions."""
        return sum(2 * child.weight.numel() for child in self.children() if isinstance(child, ShortConvolution))

    def recurrence_flops(self) -> int:
        """Forward FLOPs of one token in the recurrence."""
        return recurrence_flops_per_token(
            self.num_heads, self.key_dim, self.value_dim, decay=self.decays, erase=self.erases
        )

    def project(
        self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, dim] -> q, k [B, T, key heads, K] and v [B, T, heads, V]; packed if `sequence.project` packs."""
        q, k, v = (sequence.project(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return self.split_heads(q, k, v)

    def head_numbers(self, device: torch.device) -> Tensor:
        """The numbers, from 0, that this rank's heads have in the whole model: float64 [heads]."""
        part, num_parts = self.part_of_heads
        return torch.arange(self.num_heads, dtype=torch.float64, device=device).chunk(num_parts)[part]

    def split_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [B, T, width] -> [B, T, heads, width of a head]."""
        # By width, so that a rank with a part of the heads splits the heads that it has.
        key_width, value_width = self.head_widths
        q, k = (x.unflatten(-1, (-1, key_width)) for x in (q, k))
        return q, k, v.unflatten(-1, (-1, value_width))


class ConvolvedMixer(RecurrentMixer):
    """A `RecurrentMixer` whose q, k and v pass a short convolution with SiLU."""

    def __init__(
        self,
        dim: int,
        key_width: int,
        value_width: int,
        num_key_heads: int | None = None,
        conv_bias: bool = False,
        *,
        conv_size: Annotated[int, Field(ge=1, description="Tokens that the short convolutions see.")] = 4,
        **options,
    ):
        super().__init__(dim, key_width, value_width, num_key_heads, **options)
        self.q_conv = ShortConvolution(key_width, conv_size, conv_bias, units=self.num_key_heads)
        self.k_conv = ShortConvolution(key_width, conv_size, conv_bias, units=self.num_key_heads)
        self.v_conv = ShortConvolution(value_width, conv_size, conv_bias)

    def project(
        self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        caches = {} if cache is None else cache
        q = self.q_conv(sequence.project(self.q_proj, x), sequence=sequence, cache=caches.get("q_conv"))
        k = self.k_conv(sequence.project(self.k_proj, x), sequence=sequence, cache=caches.get("k_conv"))
        v = self.v_conv(sequence.project(self.v_proj, x), sequence=sequence, cache=caches.get("v_conv"))
        return self.split_heads(q, k, v)
