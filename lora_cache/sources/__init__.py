"""Sources: where adapters come from.  A source says what a ref means, and how to get it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points

from lora_cache.adapter import AdapterRef
from lora_cache.errors import AdapterNotFoundError, ConfigError, LoraCacheError
from lora_cache.sources.base import Body, Remote, RemoteFile, RemoteSource, Source
from lora_cache.sources.hub import HubSource
from lora_cache.sources.local import LocalSource

__all__ = [
    "Body",
    "HubSource",
    "LocalSource",
    "Remote",
    "RemoteFile",
    "RemoteSource",
    "Source",
    "default_sources",
    "load_source",
]

_GROUP = "lora_cache.sources"


def default_sources() -> dict[str, Source]:
    """The sources that are always there, by the name that refs carry."""
    return {"local": LocalSource(), "hub": HubSource()}


def load_source(ref: AdapterRef, known: Iterable[str] = ()) -> Source:
    """Make the source of `ref` from an installed entry point (group ``lora_cache.sources``).

    Args:
        known: names of the sources that there are already.

    Raises:
        AdapterNotFoundError: there is none of that name.
        ConfigError: it cannot be made.
    """
    for point in entry_points(group=_GROUP, name=ref.source):
        try:
            factory: Callable[[], Source] = point.load()
            return factory()
        except LoraCacheError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{ref}: the source {ref.source!r} ({point.value}) cannot be loaded: {error}"
            ) from error
    names = sorted({*known, *(point.name for point in entry_points(group=_GROUP))})
    raise AdapterNotFoundError(
        f"{ref}: no source named {ref.source!r} is configured (there is: {', '.join(names)})"
    )
