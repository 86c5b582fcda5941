"""Mixture of experts: router, dispatch, experts and load balance."""

from torchlmoe.moe.layer import MoE

__all__ = ["MoE"]
