"""The disk tier: a store of whole adapters, and the pool that fetches them into it."""

from __future__ import annotations

from lora_cache.store.disk import DiskTier, Progress
from lora_cache.store.store import Entry, Store

__all__ = ["DiskTier", "Entry", "Progress", "Store"]
