"""Rotary position embedding on the first channels of each head (arXiv 2104.09864), from positions in the document."""

import torch
from torch import Tensor

from torchlmoe.layers.rope_scaling import RopeScaling


def check_rotary_dim(rotary_dim: int, what: str) -> None:
    """Raises ValueError if the rotary channels that `what` gives are not pairs."""
    if rotary_dim % 2:
        raise ValueError(f"Rotary phases turn pairs of channels; {what} gives {rotary_dim}; make it an even number.")


def rotary_phases(
    positions: Tensor, rotary_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """positions int64 [B, T] -> (cos, sin), each [B, T, 1, rotary_dim / 2] in float64, times the scaling's factor."""
    # float64: the phase of a late position would lose digits in float32.
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64) / rotary_dim
    frequencies, factor = base**-exponent, 1.0
    if scaling is not None:
        frequencies, factor = scaling.frequencies(frequencies, base), scaling.phase_factor
    phase = positions[..., None].double() * frequencies
    return factor * phase.cos()[:, :, None], factor * phase.sin()[:, :, None]


def rotate(x: Tensor, phases: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, T, H, D] -> like x: channel i turns with channel i + rotary_dim / 2, the others do not change."""
    cos, sin = phases
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    first, second = first.to(dtype), second.to(dtype)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], -1)
