"""Weights of other formats: rules that rename, split and concatenate tensors, and tables of rules for families."""

from torchlmoe.interop.rules import Rule, convert, prefixed

__all__ = ["Rule", "convert", "prefixed"]
