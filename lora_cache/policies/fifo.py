"""First in, first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lora_cache.key import AdapterKey
from lora_cache.policies.base import RemovalReason


class FIFO:
    """Evicts what came into the tier first, however much it is used (Belady, IBM Systems J. 1966).

    Every call is O(1).
    """

    def __init__(self) -> None:
        self._order: OrderedDict[AdapterKey, float] = OrderedDict()  # when it came, oldest first

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        self._order[key] = now

    def on_access(self, key: AdapterKey, now: float) -> None:
        pass

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        del self._order[key]

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter(self._order)

    def explain(self, key: AdapterKey, now: float) -> str:
        return f"came {now - self._order[key]:.3g} s ago"
