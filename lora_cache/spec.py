"""Specs: ``name:setting=value,setting=value``, how something with settings is written in one word.

Policies (``lfu:half_life_s=inf``) and synthetic traffic (``zipf:adapters=1000,skew=1.2``) are
named this way, on the command line and in settings files.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, TypeVar

from lora_cache.errors import ConfigError

T = TypeVar("T")


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Take a spec apart into its name and its settings.

    Raises:
        ConfigError: a setting has no name or no value, or comes twice.
    """
    name, colon, rest = text.partition(":")
    settings: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        setting, equals, value = (piece.strip() for piece in part.partition("="))
        if not (setting and equals and value):
            raise ConfigError(f"{text!r}: {part!r} is not of the form setting=value")
        if setting in settings:
            raise ConfigError(f"{text!r} sets {setting} twice")
        settings[setting] = value
    return name.strip(), settings


def split_specs(text: str) -> list[str]:
    """Split a list of specs at its commas, but not at those between the settings of one spec.

    ``"lru,slru:a=1,b=2,fifo"`` is ``lru``, ``slru:a=1,b=2`` and ``fifo``.
    """
    specs: list[str] = []
    for part in text.split(","):
        is_setting = "=" in part and ":" not in part.partition("=")[0]
        if is_setting and specs:
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    return specs


def call_with(factory: Callable[..., T], settings: dict[str, str], what: str) -> T:
    """Call `factory` with `settings`, those that look like numbers as numbers.

    Args:
        what: names the thing that is made, for messages.

    Raises:
        ConfigError: a setting is unknown or its value is refused.
    """
    if not settings:
        return factory()
    known = [p.name for p in signature(factory).parameters.values() if _by_name(p)]
    if unknown := settings.keys() - set(known):
        has = f"its settings are {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"{what} has no setting {min(unknown)!r}: {has}")
    try:
        return factory(**{name: _value(text) for name, text in settings.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error


def _by_name(parameter: Parameter) -> bool:
    return parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
