"""Segmented LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.policies.base import RemovalReason


class SLRU:
    """LRU in two segments: what was used once cannot displace what was used again.

    Newcomers are on probation and leave first.  A second use protects; of what exceeds
    `protected_share` of the tier, the least recently used goes back on probation, as the most
    recent one there (Karedla, Love, Wherry, IEEE Computer 27(3), 1994).  Calls are O(1) amortised.

    The use that a copy was loaded for is its first, so the access after an insert does not
    protect; nor does the first use of a copy that was prefetched.

    Args:
        protected_share: of the copies in the tier, from 0 to 1; rounded down to whole copies.

    Raises:
        ConfigError: `protected_share` is no such share.
    """

    def __init__(self, protected_share: float = 0.8) -> None:
        if not 0 <= protected_share <= 1:
            raise ConfigError(f"protected_share must be from 0 to 1, not {protected_share}")
        self._share = protected_share
        self._probation: OrderedDict[AdapterKey, None] = OrderedDict()  # oldest first, like:
        self._protected: OrderedDict[AdapterKey, None] = OrderedDict()
        self._unused: set[AdapterKey] = set()  # since they were inserted

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        self._probation[key] = None
        self._unused.add(key)

    def on_access(self, key: AdapterKey, now: float) -> None:
        if key in self._protected:
            self._protected.move_to_end(key)
        elif key in self._unused:
            self._unused.remove(key)
            self._probation.move_to_end(key)
        else:
            del self._probation[key]
            self._protected[key] = None

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        size = len(self._probation) + len(self._protected)
        del (self._protected if key in self._protected else self._probation)[key]
        self._unused.discard(key)
        if reason is RemovalReason.EVICTED:
            # Somebody had to leave, so `size` is all that the tier can hold: a policy is not told.
            # That is soon enough: going back changes nobody's rank before a newcomer ranks behind.
            while len(self._protected) > int(self._share * size):
                oldest, _ = self._protected.popitem(last=False)
                self._probation[oldest] = None

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return chain(self._probation, self._protected)

    def explain(self, key: AdapterKey, now: float) -> str:
        if key in self._protected:
            return "used again, and longest ago of those that were"
        return "on probation: not used again since it came, or went back there"
