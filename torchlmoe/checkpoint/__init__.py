"""Saves and resumes runs by atomic checkpoints, exports models as folders, and opens both."""

from torchlmoe.checkpoint.open import open_model

__all__ = ["open_model"]
