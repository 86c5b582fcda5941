"""The operations that have kernels, for benchmarks and cross-compilation: inputs, ways to run them, and FLOPs.

A way is an implementation. It takes some of an operation's inputs, under its own argument names, and returns the
output. Functions of fla are imported at their first call, so that this file does not need it.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchlmoe.layers.decay_gate import DecayGate
from torchlmoe.layers.norms import GatedRMSNorm
from torchlmoe.ops import (
    elementwise_flops_per_token,
    elementwise_recurrence,
    linear_recurrence,
    recurrence_flops_per_token,
)
from torchlmoe.ops.causal_conv import causal_conv
from torchlmoe.ops.chunked import Terms, chunked_forward, layouts_of
from torchlmoe.routing.dispatch import Slots, gather_slots, sum_slots

OURS, PLAIN = "torchlmoe", "PyTorch"  # PLAIN: a few torch functions, with which OURS is compared
MOST_CHUNKS_TO_COMPILE = 32  # the traced form is unrolled over chunks


@dataclass(frozen=True)
class Size:
    """B rows of T tokens with H value heads. Groups of value heads share a key head."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    key_heads: int

    def __str__(self) -> str:
        heads = f"H{self.heads}" if self.key_heads == self.heads else f"H{self.key_heads}/{self.heads}"
        dims = f"D{self.key_dim}" if self.key_dim == self.value_dim else f"K{self.key_dim} V{self.value_dim}"
        return f"B{self.batch} T{self.length} {heads} {dims}"


@dataclass(frozen=True)
class Way:
    """run(**arguments) -> output. names: input of the operation -> name of the argument."""

    run: Callable[..., Tensor]
    names: dict[str, str]

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.names[name]: tensor for name, tensor in inputs.items() if name in self.names}


@dataclass(frozen=True)
class Operation:
    """make(size, dtype, device) -> new random inputs by name. flops(size) -> FLOPs of the forward by its definition."""

    make: Callable[[Size, torch.dtype, str], dict[str, Tensor]]
    ways: dict[str, Way]
    flops: Callable[[Size], float]
    decode_ways: dict[str, Way] = field(default_factory=dict)  # for one token from a state
    state_shape: Callable[[Size], tuple[int, ...]] = lambda size: (size.batch, size.heads, size.key_dim, size.value_dim)


def as_leaf(x: Tensor) -> Tensor:
    """Return x; it requires a gradient if its dtype allows one."""
    return x.requires_grad_() if x.is_floating_point() else x


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs in float32; integers are unchanged."""
    return {name: x.to(torch.float32) if x.is_floating_point() else x for name, x in inputs.items()}


def kernel_modules() -> list[ModuleType]:
    """Return the modules of all files in kernels/."""
    folder = importlib.import_module("torchlmoe.kernels").__path__
    return [importlib.import_module(f"torchlmoe.kernels.{module.name}") for module in pkgutil.iter_modules(folder)]


def _recurrence_inputs(terms: tuple[str, ...]) -> Callable[[Size, torch.dtype, str], dict[str, Tensor]]:
    """Return `make` for a recurrence. Gates are like those after initialization, and log decays are in float32."""

    def make(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        tokens = (size.batch, size.length, size.heads)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        def unit(*shape: int) -> Tensor:
            return F.normalize(randn(*shape), dim=-1)

        key_tokens = (size.batch, size.length, size.key_heads, size.key_dim)
        inputs = {
            "q": randn(*key_tokens).to(dtype),
            "k": unit(*key_tokens).to(dtype),
            "v": randn(*tokens, size.value_dim).to(dtype),
        }
        if "head" in terms:
            inputs["log_decay"] = torch.log1p(-torch.exp2(-5.0 - torch.arange(size.heads, device=device)))
        if "scalar" in terms:
            inputs["log_decay"] = F.logsigmoid(randn(*tokens) + 4)
        if "channel" in terms:
            inputs["log_decay"] = F.logsigmoid(randn(*tokens, size.key_dim) + 2).clamp_min(-0.6)
        if "beta" in terms:
            inputs["erase"] = torch.rand(*tokens, device=device).to(dtype)
        if "elsewhere" in terms:  # like RWKV-7: erase for the decayed state, and undecayed_erase for fla, before decay
            read = unit(*tokens, size.key_dim)
            inputs["erase"] = (read * (-inputs["log_decay"]).exp()).to(dtype)
            inputs["undecayed_erase"] = -read.to(dtype)
            inputs["erase_key"] = (read * torch.rand(*tokens, 1, device=device)).to(dtype)
        if "value" in terms:
            inputs["value_log_decay"] = F.logsigmoid(randn(*tokens, size.value_dim) + 2)
        if "bonus" in terms:
            inputs["bonus"] = randn(size.heads, size.key_dim)
        return inputs

    return make


def _kernels() -> str:
    """Return the backend of OURS. If kernels can run, it is "triton", which never falls back to another one."""
    return "triton" if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else "auto"


def _ours(**arguments: Tensor) -> Tensor:
    return linear_recurrence(**arguments, backend=_kernels())[0]


def _chunked(**arguments: Tensor) -> Tensor:
    return linear_recurrence(**arguments, backend="chunked")[0]


@cache
def _compiled_forward() -> Callable[..., Any]:
    return torch.compile(chunked_forward)


def _compiled_chunked(**inputs: Tensor) -> Tensor:
    names = ("q", "k", "v", "log_decay", "erase", "erase_key", "value_log_decay", "bonus")
    layouts = layouts_of(inputs["v"], None)
    if (num_slabs := len(layouts[0].slabs)) > MOST_CHUNKS_TO_COMPILE:
        raise ValueError(f"{num_slabs} unrolled slabs are more than {MOST_CHUNKS_TO_COMPILE}: not compiled")
    return _compiled_forward()(Terms(*(inputs.get(name) for name in names), 1.0), None, layouts)[0]


def _fla(description: str, output: int, **fixed: Any) -> Way:
    """Return a way of fla.

    description: "<module>.<function> [<input>:<fla's argument> ...]", in fla.ops. output: index of the result.
    """
    path, *renamed = description.split()
    module, _, name = path.rpartition(".")

    def run(**arguments: Tensor) -> Tensor:
        function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
        return function(**arguments, scale=1.0, **fixed)[output]

    own_names = {"q": "q", "k": "k", "v": "v", "initial_state": "initial_state"}
    return Way(run, own_names | dict(pair.split(":") for pair in renamed))


def _our_step(**arguments: Tensor) -> Tensor:
    state = linear_recurrence(**arguments, output_final_state=True, backend=_kernels())[1]
    assert state is not None
    return state


def _recurrence(*terms: str, fla: str | None = None, fla_step: str | None = None, **fixed: Any) -> Operation:
    """Return an instance of `linear_recurrence`. fla, fla_step: for `_fla`, for all tokens and for one token."""
    taken = ["q", "k", "v", "initial_state"]
    taken += ["log_decay"] if {"head", "scalar", "channel"} & set(terms) else []
    taken += ["erase"] if {"beta", "elsewhere"} & set(terms) else []
    taken += ["erase_key"] if "elsewhere" in terms else []
    taken += ["value_log_decay"] if "value" in terms else []
    taken += ["bonus"] if "bonus" in terms else []
    names = {name: name for name in taken}
    ways = {
        OURS: Way(_ours, names),
        PLAIN: Way(_chunked, names),
        "compiled PyTorch": Way(_compiled_chunked, names),
    }
    decode_ways = {OURS: Way(_our_step, names)}
    if fla:
        ways["fla"] = _fla(fla, 0, **fixed)
    if fla_step:
        decode_ways["fla"] = _fla(fla_step, 1, output_final_state=True)

    def flops(size: Size) -> float:
        per_token = recurrence_flops_per_token(
            size.heads,
            size.key_dim,
            size.value_dim,
            decay=bool({"log_decay", "value_log_decay"} & set(taken)),
            erase="erase" in taken,
        )
        return size.batch * size.length * per_token

    return Operation(_recurrence_inputs(terms), ways, flops, decode_ways)


def _softmax(backends: list[SDPBackend]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backends):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=1.0).transpose(1, 2)

    return run


def _rows(size: Size, dtype: torch.dtype, device: str, *per_channel: str) -> dict[str, Tensor]:
    """Return x and gate [B, T, H, V], and float32 vectors [H * V] with the names per_channel."""
    tokens = (size.batch, size.length, size.heads, size.value_dim)
    inputs = {name: torch.randn(tokens, device=device).to(dtype) for name in ("x", "gate")}
    channels = size.heads * size.value_dim
    return inputs | {name: torch.randn(channels, device=device) for name in per_channel}


def _convolution_inputs(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    x = _rows(size, dtype, device)["x"].flatten(2)
    return {"x": x, "weight": torch.randn(x.shape[-1], 4, device=device).to(dtype)}


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    y = F.conv1d(x.mT, weight[:, None], padding=weight.shape[1] - 1, groups=x.shape[-1])
    return F.silu(y[..., : x.shape[1]]).mT


def _norm_inputs(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    weight = torch.rand(size.value_dim, device=device).to(dtype)
    return _rows(size, dtype, device) | {"weight": weight}


def _our_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    with torch.device("meta"):
        norm = GatedRMSNorm(x.shape[-1])
    return functional_call(norm, {"weight": weight}, (x, gate))


def _norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6) * F.silu(gate)


def _gate_inputs(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return inputs like those of Kimi Delta Attention: a step for every channel, a rate for every head."""
    inputs = _rows(size, dtype, device, "bias")
    return {"x": inputs["x"].flatten(2), "bias": inputs["bias"], "A_log": torch.rand(size.heads, device=device)}


def _our_gate(x: Tensor, bias: Tensor, A_log: Tensor) -> Tensor:
    with torch.device("meta"):
        gate = DecayGate(len(A_log), len(bias) // len(A_log))
    return functional_call(gate, {"A_log": A_log, "dt_bias": bias}, (x, False))[0]


def _gate(x: Tensor, bias: Tensor, A_log: Tensor) -> Tensor:
    step = F.softplus(x.float() + bias).unflatten(-1, (len(A_log), -1))
    return -A_log.exp()[:, None] * step


def _dispatch_inputs(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return tokens with the width of a model, and 8 of 64 experts for each."""
    scores = torch.rand(size.batch * size.length, 64, device=device)
    x = torch.randn(len(scores), 16 * size.value_dim, device=device).to(dtype)
    return {"x": x, "expert": scores.topk(8).indices}


def _our_dispatch(x: Tensor, expert: Tensor) -> Tensor:
    slots = Slots.sorted_by_expert(expert, 64)
    return sum_slots(gather_slots(x, slots), slots)


def _dispatch(x: Tensor, expert: Tensor) -> Tensor:
    token = expert.flatten().argsort(stable=True) // expert.shape[1]
    return torch.zeros_like(x).index_add(0, token, x.index_select(0, token))


def _fused(
    make: Callable[[Size, torch.dtype, str], dict[str, Tensor]],
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    names: str,
) -> Operation:
    """Return an operation whose time depends on its bytes, not on FLOPs."""
    taken = {name: name for name in names.split()}
    return Operation(make, {OURS: Way(ours, taken), PLAIN: Way(plain, taken)}, lambda size: 0.0)


STATE_DIM = 16  # Mamba's default


def _mamba_inputs(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return inputs with one head: keys have the width of the state, and values have all channels."""
    tokens, channels = (size.batch, size.length, 1), size.heads * size.value_dim
    rates = -torch.arange(1, STATE_DIM + 1, device=device, dtype=torch.float32)
    return {
        "q": torch.randn(*tokens, STATE_DIM, device=device).to(dtype),
        "k": torch.randn(*tokens, STATE_DIM, device=device).to(dtype),
        "v": torch.randn(*tokens, channels, device=device).to(dtype),
        "log_decay": rates[None, :, None].expand(1, -1, channels).contiguous(),
        "step": torch.rand(*tokens, channels, device=device) / 10,
    }


def _mamba_flops(size: Size) -> float:
    per_token = elementwise_flops_per_token(1, STATE_DIM, size.heads * size.value_dim, step=True)
    return size.batch * size.length * per_token


def _our_elementwise_step(**arguments: Tensor) -> Tensor:
    state = elementwise_recurrence(**arguments, output_final_state=True, backend=_kernels())[1]
    assert state is not None
    return state


_MAMBA_NAMES = {name: name for name in ("q", "k", "v", "log_decay", "step")}

OPERATIONS = {
    "linear attention": _recurrence(
        fla="linear_attn.chunk_linear_attn", fla_step="simple_gla.fused_recurrent_simple_gla", normalize=False
    ),
    "retention": _recurrence("head", fla="retention.chunk_retention", fla_step="retention.fused_recurrent_retention"),
    "GLA": _recurrence("channel", fla="gla.chunk_gla log_decay:g", fla_step="gla.fused_recurrent_gla log_decay:gk"),
    "Mamba2": _recurrence(
        "scalar",
        fla="simple_gla.chunk_simple_gla log_decay:g",
        fla_step="simple_gla.fused_recurrent_simple_gla log_decay:g",
    ),
    "RWKV6": _recurrence("channel", "bonus", fla="rwkv6.chunk_rwkv6 q:r log_decay:w bonus:u"),
    "value decay": _recurrence("value"),  # the second pass of GSA
    "gated fast weights": _recurrence("channel", "value"),
    "DeltaNet": _recurrence("beta", fla="delta_rule.chunk_delta_rule erase:beta"),
    "Gated DeltaNet": _recurrence(
        "scalar",
        "beta",
        fla="gated_delta_rule.chunk_gated_delta_rule log_decay:g erase:beta",
        fla_step="gated_delta_rule.fused_recurrent_gated_delta_rule log_decay:g erase:beta",
    ),
    "KDA": _recurrence(
        "channel",
        "beta",
        fla="kda.chunk_kda log_decay:g erase:beta",
        fla_step="kda.fused_recurrent_kda log_decay:g erase:beta",
    ),
    "RWKV7": _recurrence(
        "channel",
        "elsewhere",
        fla="rwkv7.chunk_rwkv7 q:r log_decay:w undecayed_erase:a erase_key:b",
        fla_step="rwkv7.fused_recurrent_rwkv7 q:r log_decay:w undecayed_erase:a erase_key:b",
    ),
    "Mamba": Operation(
        _mamba_inputs,
        {
            OURS: Way(lambda **x: elementwise_recurrence(**x, backend=_kernels())[0], _MAMBA_NAMES),
            PLAIN: Way(lambda **x: elementwise_recurrence(**x, backend="chunked")[0], _MAMBA_NAMES),
        },
        _mamba_flops,
        {OURS: Way(_our_elementwise_step, _MAMBA_NAMES | {"initial_state": "initial_state"})},
        lambda size: (size.batch, 1, STATE_DIM, size.heads * size.value_dim),
    ),
    "short convolution": _fused(_convolution_inputs, causal_conv, _convolve, "x weight"),
    "gated RMS norm": _fused(_norm_inputs, _our_norm, _norm, "x gate weight"),
    "decay gate": _fused(_gate_inputs, _our_gate, _gate, "x bias A_log"),
    "dispatch and combine": _fused(_dispatch_inputs, _our_dispatch, _dispatch, "x expert"),
    "softmax attention": Operation(
        _recurrence_inputs(()),
        {"FlashAttention (SDPA)": Way(_softmax([SDPBackend.FLASH_ATTENTION]), {"q": "q", "k": "k", "v": "v"})},
        lambda size: 2 * size.batch * size.heads * size.length**2 * (size.key_dim + size.value_dim) / 2,
    ),
}
