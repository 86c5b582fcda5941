"""Classes whose constructor's annotated keyword arguments are settings."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from pydantic import Field

NormEps = Annotated[float, Field(ge=1e-12, le=0.1, description="Added under the root of every norm.")]
InitStd = Annotated[float, Field(ge=1e-6, le=10, description="Standard deviation of projections at the start.")]


class Configurable:
    """A class whose keyword arguments are settings. Annotate each with its type and a `pydantic.Field` with limits."""

    @classmethod
    def settings(cls) -> dict[str, tuple[Any, Any]]:
        """Return the keyword arguments of the constructor: name -> (annotation, default, or ... without one).

        If it has `**options`, those of the parent's constructor are added.
        """
        found: dict[str, tuple[Any, Any]] = {}
        for base in cls.__mro__:
            constructor = base.__dict__.get("__init__")
            if constructor is None:
                continue
            parameters = keyword_settings(constructor)
            for name, setting in parameters.items():
                found.setdefault(name, setting)
            if not takes_more(constructor):
                break
        return found


def keyword_settings(function: Callable) -> dict[str, tuple[Any, Any]]:
    """Return the keyword-only arguments of a function: name -> (annotation, default, or ... without one)."""
    hints = get_type_hints(function, include_extras=True)
    return {
        parameter.name: (hints[parameter.name], ... if parameter.default is parameter.empty else parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def takes_more(function: Callable) -> bool:
    """Return whether a function has `**options`."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values())
