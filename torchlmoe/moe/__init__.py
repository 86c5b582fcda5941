"""The mixture-of-experts layer's place in earlier versions."""

from torchlmoe.feed_forwards.moe import MoE

__all__ = ["MoE"]
