"""Keeps the import of `load_config` of earlier versions; it is now in `torchlmoe.config.load`."""

from torchlmoe.config.load import ConfigError, config_from, load_config, to_toml

__all__ = ["ConfigError", "config_from", "load_config", "to_toml"]
