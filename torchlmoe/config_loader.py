"""The place of `load_config` in earlier versions; it is in `torchlmoe.config.load`."""

from torchlmoe.config.load import ConfigError, config_from, load_config, to_toml

__all__ = ["ConfigError", "config_from", "load_config", "to_toml"]
