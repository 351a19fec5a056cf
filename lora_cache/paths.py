"""Where this package keeps what it may keep."""

from __future__ import annotations

import os
from pathlib import Path

from lora_cache.errors import ConfigError


def cache_home() -> Path:
    """``$LORA_CACHE_HOME``, or ``lora-cache`` in the user's cache directory.

    Raises:
        ConfigError: ``LORA_CACHE_HOME`` is no absolute path.
    """
    if home := os.environ.get("LORA_CACHE_HOME"):
        if not Path(home).expanduser().is_absolute():
            raise ConfigError(f"LORA_CACHE_HOME={home!r}: give an absolute path")
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora-cache"
