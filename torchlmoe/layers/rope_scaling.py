"""Scaled rotary wavelengths for documents longer than those of pretraining.

A scaling changes the frequency of each pair of channels and gives two factors, one for the phases' cos and sin and one
for the softmax scale. All are float64. Names and results agree with those of transformers.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from torchlmoe.options import keyword_settings
from torchlmoe.registry import Registry

Factor = Annotated[float, Field(ge=1, le=1e6, description="Factor by which documents may be longer.")]
FirstLength = Annotated[int, Field(ge=1, le=2**40, description="Document length in pretraining.")]
ScaledTurns = Annotated[float, Field(ge=1e-6, le=1e6, description="Pairs with fewer turns in that length are scaled.")]
KeptTurns = Annotated[float, Field(ge=1e-6, le=1e6, description="Pairs with more turns in that length are kept.")]


@dataclass(frozen=True)
class RopeScaling:
    """No scaling: the base class of the others."""

    phase_factor = 1.0
    softmax_factor = 1.0

    def frequencies(self, plain: Tensor, base: float) -> Tensor:
        """plain: base^(-2 i / D) for i < D / 2, float64 [D / 2] -> like plain."""
        return plain


@dataclass(frozen=True, kw_only=True)
class Linear(RopeScaling):
    """All positions divided by `factor` (arXiv 2306.15595)."""

    factor: Factor

    def frequencies(self, plain: Tensor, base: float) -> Tensor:
        return plain / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3(RopeScaling):
    """Long wavelengths divided by `factor`, short ones kept, and a blend between them (Llama 3.1).

    A wavelength is long beyond original_max_position_embeddings / low_freq_factor, and short below
    original_max_position_embeddings / high_freq_factor.
    """

    factor: Factor
    original_max_position_embeddings: FirstLength
    low_freq_factor: ScaledTurns = 1.0
    high_freq_factor: KeptTurns = 4.0

    def __post_init__(self) -> None:
        _check_order("low_freq_factor", self.low_freq_factor, "high_freq_factor", self.high_freq_factor)

    def frequencies(self, plain: Tensor, base: float) -> Tensor:
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, kw_only=True)
class Yarn(RopeScaling):
    """YaRN (arXiv 2309.00071), with the two temperatures of DeepSeek-V2 and V3 (arXiv 2405.04434).

    With m(x) = 1 + 0.1 x log(factor), phases are multiplied by m(1), or by m(mscale) / m(mscale_all_dim) if both are
    given; with mscale_all_dim, the scale of softmax is multiplied by m(mscale_all_dim)^2.
    """

    factor: Factor
    original_max_position_embeddings: FirstLength
    beta_fast: KeptTurns = 32.0
    beta_slow: ScaledTurns = 1.0
    truncate: Annotated[bool, Field(description="Begin and end the blend at whole pairs.")] = True
    attention_factor: Annotated[
        float | None, Field(ge=1e-6, le=1e6, description="Factor on cos and sin; from factor and mscale if unset.")
    ] = None
    mscale: Annotated[
        float | None, Field(ge=1e-6, le=100, description="With mscale_all_dim: sets the factor on cos and sin.")
    ] = None
    mscale_all_dim: Annotated[
        float | None, Field(ge=1e-6, le=100, description="Sets the factor on the softmax scale; no factor if unset.")
    ] = None

    def __post_init__(self) -> None:
        _check_order("beta_slow", self.beta_slow, "beta_fast", self.beta_fast)
        if self.mscale is not None and (self.mscale_all_dim is None or self.attention_factor is not None):
            raise ValueError(
                f"rope_scaling has mscale = {self.mscale}, which has no effect without mscale_all_dim or with "
                "attention_factor; leave it out."
            )

    @property
    def phase_factor(self) -> float:  # type: ignore[override]
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def softmax_factor(self) -> float:  # type: ignore[override]
        return 1.0 if self.mscale_all_dim is None else self._temperature(self.mscale_all_dim) ** 2

    def frequencies(self, plain: Tensor, base: float) -> Tensor:
        width = 2 * plain.shape[-1]
        low, high = (self._pair_with(turns, width, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 * (low == high)
        pair = torch.arange(plain.shape[-1], device=plain.device, dtype=plain.dtype)
        scaled = ((pair - low) / (high - low)).clamp(0, 1)
        return plain * (1 - scaled + scaled / self.factor)

    def _temperature(self, weight: float) -> float:
        return 1 + 0.1 * weight * math.log(self.factor)

    def _pair_with(self, turns: float, width: int, base: float) -> float:
        """The (fractional) number of the pair that makes this many turns in the first length."""
        return width * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))


ROPE_SCALINGS: Registry[type[RopeScaling]] = Registry(
    "Rope scaling", {"default": RopeScaling, "linear": Linear, "llama3": Llama3, "yarn": Yarn}
)


RopeScalingTable = Annotated[
    dict[str, Any] | None,
    Field(
        description="Rotary wavelengths for longer documents: a table with type (default | linear | llama3 | yarn) and "
        "that type's numbers; unscaled if unset."
    ),
]


def rope_scaling_of(table: dict[str, Any] | None) -> RopeScaling:
    """Make a scaling from a table with `type`, a name in `ROPE_SCALINGS`, and that type's numbers; None for no scaling.

    Raises ValueError for an unknown type, and for missing or unknown numbers.
    """
    if table is None:
        return RopeScaling()
    options = {name: value for name, value in table.items() if name != "type"}
    kind = ROPE_SCALINGS.get(table.get("type", ""))
    if kind is None:
        raise ValueError(f"rope_scaling has type = {table.get('type')!r}; choose one of {', '.join(ROPE_SCALINGS)}.")
    known = keyword_settings(kind)
    for name in options.keys() - known.keys():
        raise ValueError(
            f"rope_scaling of type {table['type']!r} has no {name}; it takes {', '.join(known) or 'nothing'}."
        )
    for name, (_, default) in known.items():
        if default is ... and name not in options:
            raise ValueError(f"rope_scaling of type {table['type']!r} needs {name}; give it.")
    return kind(**options)


def _check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    if low >= high:
        raise ValueError(f"rope_scaling has {low_name} = {low}, which must be below {high_name} = {high}.")
