"""Settings: their definitions (`settings`), reading (`load`), and batch sizes (`batch`)."""

from torchlmoe.config.settings import Config

__all__ = ["Config"]
