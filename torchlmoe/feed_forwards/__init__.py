"""Feed-forward layers by name. A block with `none` has no feed-forward layer."""

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.registry import Registry

NONE = "none"
FEED_FORWARDS: Registry[type[FeedForward]] = Registry("Feed-forward", {"moe": MoE, "dense": Dense})

__all__ = ["FEED_FORWARDS", "NONE", "FeedForward"]
