"""Rotary settings in config.json: `rope_parameters`, or rope_theta, rope_scaling and partial_rotary_factor."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torchlmoe.interop.keys import Keys
from torchlmoe.layers.rope_scaling import ROPE_SCALINGS
from torchlmoe.mixers.attention import Attention

# Keys that split the phases between time, height and width. In text all three have the same position.
_OF_IMAGES = ("mrope_section", "mrope_interleaved")


def read_rope(keys: Keys, *, base: float = 10_000.0, fraction: float = 1.0) -> dict[str, Any]:
    """Return rope_base, rotary_fraction and rope_scaling, options of `attention`.

    base, fraction: defaults of the family.
    """
    given = {**keys.table("rope_scaling"), **keys.table("rope_parameters")}
    base = given.pop("rope_theta", None) or keys.number("rope_theta", base)
    fraction = given.pop("partial_rotary_factor", None) or keys.number("partial_rotary_factor", fraction)
    keys.skip("rope_theta", "partial_rotary_factor")
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given = {name: value for name, value in given.items() if value is not None and name not in (*_OF_IMAGES, "type")}
    if kind not in ROPE_SCALINGS:
        raise ValueError(
            f"{keys.place} has rope_type = {kind!r}, which has no counterpart in torchlmoe; supported are "
            f"{', '.join(ROPE_SCALINGS)}."
        )
    if kind in ("yarn", "llama3") and "original_max_position_embeddings" not in given:
        given["original_max_position_embeddings"] = keys.integer("max_position_embeddings")
    scaling = None if kind == "default" else {"type": kind, **given}
    return {"rope_base": float(base), "rotary_fraction": float(fraction), "rope_scaling": scaling}


def write_rope(mixer: Attention, *, fraction: bool = False) -> dict[str, Any]:
    """Return `rope_parameters` of a mixer. fraction: whether the family has partial_rotary_factor."""
    (kind,) = [name for name, scaling in ROPE_SCALINGS.items() if type(mixer.rope_scaling) is scaling]
    numbers = {} if kind == "default" else asdict(mixer.rope_scaling)  # type: ignore[call-overload]
    parameters = {"rope_type": kind, "rope_theta": mixer.rope_base}
    if fraction:
        parameters["partial_rotary_factor"] = mixer.rotary_dim / mixer.head_dim
    return {
        "rope_parameters": parameters | {name: value for name, value in numbers.items() if value is not None},
    }
