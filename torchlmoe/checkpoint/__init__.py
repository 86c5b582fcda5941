"""Checkpoints of runs, whole or not there at all; models as folders; and opening either."""

from torchlmoe.checkpoint.open import open_model

__all__ = ["open_model"]
