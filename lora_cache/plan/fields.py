"""Reading a model's configuration, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_cache.errors import ConfigError


class Fields:
    """A configuration's fields, checked where they are read.

    Args:
        source: names the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1 (0 where that is the default).

        Raises:
            ConfigError: it is missing without a default, or no such number.
        """
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise ConfigError(f"{self._source} has no {name}: is it a model's config.json?")
            return default
        least = 0 if default == 0 else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 40:
            raise ConfigError(f"{self._source}: {name} is {value!r}, not a whole number")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or False."""
        value = self._values.get(name)
        return default if value is None else bool(value)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def numbers(self, name: str) -> frozenset[int]:
        """A list of numbers; empty if it is missing."""
        value = self._values.get(name) or ()
        if not isinstance(value, list | tuple) or not all(isinstance(n, int) for n in value):
            raise ConfigError(f"{self._source}: {name} is {value!r}, not a list of numbers")
        return frozenset(value)
