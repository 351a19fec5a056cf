"""Sources: where adapters come from.  A source turns a ref into an adapter on disk."""

from __future__ import annotations

from lora_cache.sources.base import Source
from lora_cache.sources.hub import HubSource
from lora_cache.sources.local import LocalSource

__all__ = ["HubSource", "LocalSource", "Source"]
