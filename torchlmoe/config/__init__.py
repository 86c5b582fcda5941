"""Settings: what there is (`settings`), how they are read (`load`), and what follows from them (`batch`)."""

from torchlmoe.config.settings import Config

__all__ = ["Config"]
