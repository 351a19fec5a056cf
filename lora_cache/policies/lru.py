"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lora_cache.key import AdapterKey
from lora_cache.policies.base import RemovalReason


class LRU:
    """Evicts what has gone unused for longest.  Every call is O(1)."""

    def __init__(self) -> None:
        self._order: OrderedDict[AdapterKey, float] = OrderedDict()  # last use, oldest first

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        self._order[key] = now

    def on_access(self, key: AdapterKey, now: float) -> None:
        self._order.move_to_end(key)
        self._order[key] = now

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        del self._order[key]

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter(self._order)

    def explain(self, key: AdapterKey, now: float) -> str:
        return f"last used {now - self._order[key]:.3g} s ago"
