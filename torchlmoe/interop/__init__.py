"""Weights of other formats: rules that rename, split and join tensors, and tables of them for families of models."""

from torchlmoe.interop.rules import Rule, convert, prefixed

__all__ = ["Rule", "convert", "prefixed"]
