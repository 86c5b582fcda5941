"""Mixture of memories (arXiv 2502.13685): several states of an inner mixer's recurrence; a token is routed to a few.

    p_t = softmax(W x_t), top-k: weights g_t of the chosen memories, made to sum to one if there are several
    M^i_t = the inner mixer's update of M^i_{t-1} for the chosen i, else M^i_{t-1}
    o_t = (sum_i g^i_t M^i_t + M^shared_t)^T q_t

The rest is the inner mixer. Each memory of each document is a run of the tokens routed to it. Each memory has its own
projections of keys and values, and of the gates that the authors' code counts with them, and convolutions see the runs.
With `single_kv_proj` all memories share the projections; then convolutions see the tokens in their own order, and only
the recurrence sees runs. The shared memory is an additional memory for every token, with weight one.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.recurrence import LinearRecurrence
from torchlmoe.layers.rope_scaling import RopeScalingTable
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.short_convolution import ShortConvolution
from torchlmoe.mixers.base import Mixer, Place
from torchlmoe.mixers.memories import Memories, MemoryLinear, MemoryRecurrence, MemorySequence, RunConvolution
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.ops.grouped_matmul import run_alignment
from torchlmoe.ops.linear_recurrence import Backend
from torchlmoe.options import InitStd, NormEps
from torchlmoe.routing.balance import LoadBalance, RoutedLayer
from torchlmoe.routing.router import Router

_KEYS_AND_VALUES = ("k_proj", "v_proj")
# By mixer, the projections that each memory has for itself. A mixer that is added here must make all inputs of its
# recurrence by `sequence.project`, and must not use them elsewhere.
OWN_PROJECTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bla", "lightning", "retention", "gla", "hgrn2", "gfw", "based", "rebased"), _KEYS_AND_VALUES),
    **dict.fromkeys(("deltanet", "kda"), (*_KEYS_AND_VALUES, "b_proj")),
    "gated_deltanet": (*_KEYS_AND_VALUES, "b_proj", "a_proj"),
}


class MixtureOfMemories(RoutedLayer, Mixer):
    def __init__(
        self,
        dim: int,
        place: Place = Place(),  # noqa: B008
        *,
        num_heads: Annotated[int, Field(ge=1, description="Heads of the inner mixer.")],
        inner: Annotated[str, Field(description="Inner mixer, whose state exists once per memory.")] = "gated_deltanet",
        inner_options: Annotated[dict[str, Any] | None, Field(description="Settings of the inner mixer.")] = None,
        num_memories: Annotated[int, Field(ge=1, description="Memories that tokens are routed to.")] = 4,
        top_k: Annotated[int, Field(ge=1, description="Memories that each token is routed to.")] = 2,
        shared_memory: Annotated[bool, Field(description="Add one memory for all tokens.")] = True,
        single_kv_proj: Annotated[
            bool, Field(description="Share the projections of keys and values between memories.")
        ] = False,
        aux_loss_weight: Annotated[
            float, Field(ge=0, le=1000, description="Weight of the router's balance loss.")
        ] = 1e-2,
        rope_base: Annotated[
            float, Field(gt=1, le=1e12, description="Base of the rotary wavelengths of the inner mixer, if it has any.")
        ] = 10_000.0,
        rope_scaling: RopeScalingTable = None,
        norm_eps: NormEps = 1e-6,
        backend: Backend = "auto",
        init_std: InitStd = 0.02,
    ):
        super().__init__()
        from torchlmoe.mixers import MIXERS  # imported here, because the registry holds this class too

        if top_k > num_memories:
            raise ValueError(f"top_k = {top_k} is more than num_memories = {num_memories}.")
        if inner not in MIXERS:
            raise ValueError(f"inner = {inner!r} is not a mixer; choose from {', '.join(sorted(MIXERS))}.")
        self.init_std, self.num_memories, self.shared_memory = init_std, num_memories, shared_memory
        # A single weight normalized to one would be constant, and the router would learn nothing from the task.
        self.router = Router(dim, num_experts=num_memories, top_k=top_k, normalize_top_k=top_k > 1, init_std=init_std)
        self.load_balance = LoadBalance(
            num_memories, aux_loss_weight=aux_loss_weight, aux_loss_scope="sequence", z_loss_weight=0.0
        )
        settings = MIXERS[inner].settings()
        common = dict(
            num_heads=num_heads, rope_base=rope_base, rope_scaling=rope_scaling, norm_eps=norm_eps, backend=backend,
            init_std=init_std,
        )  # fmt: skip
        options = {name: value for name, value in common.items() if name in settings} | (inner_options or {})
        mixer = MIXERS[inner].at(place, dim, **options)
        num_recurrences = sum(isinstance(module, LinearRecurrence) for module in mixer.modules())
        if not isinstance(mixer, RecurrentMixer) or num_recurrences != 1:
            raise ValueError(
                f"inner = {inner!r} cannot have a mixture of memories; it must hold one linear recurrence and no more."
            )
        self.inner, self.shared_width, self.single_kv_proj = mixer, mixer.shared_width, single_kv_proj
        self.units = mixer.units
        mixer.recurrence = MemoryRecurrence(mixer.backend)
        if single_kv_proj:
            return
        if inner not in OWN_PROJECTIONS:
            raise ValueError(
                f"inner = {inner!r} cannot have separate keys and values for each memory; set single_kv_proj = true."
            )
        for name in OWN_PROJECTIONS[inner]:
            shared = getattr(mixer, name)
            own = MemoryLinear(
                shared.in_features, shared.out_features, num_memories + shared_memory, init_std, shared.units
            )
            setattr(mixer, name, own)
        for name, child in list(mixer.named_children()):
            if isinstance(child, ShortConvolution):
                channels, width = child.weight.shape
                setattr(
                    mixer,
                    name,
                    RunConvolution(channels, width, child.bias is not None, child.activation, child.units),
                )

    def forward(
        self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None, **handed: Tensor
    ) -> Tensor:
        """handed: `shared` and `common`, for the inner mixer, which returns `shared` beside y."""
        routing = self.router(x.flatten(0, 1))
        memory_TK, weight_TK = routing.expert_TK, routing.weight_TK
        if self.training and sequence.share.loss_weight and torch.is_grad_enabled() and cache is None:
            weight_TK = self.load_balance(weight_TK, routing, memory_TK.new_zeros(()), sequence)
        if self.shared_memory:
            memory_TK = F.pad(memory_TK, (0, 1), value=self.num_memories)
            weight_TK = F.pad(weight_TK, (0, 1), value=1.0)
        memories = Memories.of_choices(
            memory_TK,
            weight_TK,
            self.num_memories + self.shared_memory,
            (x.shape[0], x.shape[1]),
            sequence.cu_seqlens,
            sequence.start,
            own_projections=not self.single_kv_proj,
            alignment=run_alignment(x),
        )
        return self.inner(x, sequence=MemorySequence.of(sequence, memories), cache=cache, **handed)

    def common(self, num_layers: int) -> nn.Module | None:
        return self.inner.common(num_layers)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        """The cache of the inner mixer, with a dimension for memories: state [batch, memories, heads, K, V]; the
        same for inputs of convolutions that see runs."""
        cache = self.inner.init_cache(batch_size, max_length, dtype, device)

        def of_each_memory(x: Tensor) -> Tensor:
            return x.unsqueeze(1).repeat_interleave(self.num_memories + self.shared_memory, 1)

        if self.single_kv_proj:
            cache["state"] = of_each_memory(cache["state"])
            return cache
        return TensorDict(cache.apply(of_each_memory), batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        slots = self.router.top_k + self.shared_memory
        flops = self.inner.flops_per_token(seq_len) + (slots - 1) * self.inner.recurrence_flops()
        if not self.single_kv_proj:
            own = (module for module in self.inner.children() if isinstance(module, MemoryLinear))
            flops += slots * sum(module.flops_per_slot() for module in own)
            flops += (slots - 1) * self.inner.convolution_flops()
        return flops + self.router.flops_per_token()
