"""Greedy-Dual-Size-Frequency."""

from __future__ import annotations

from collections.abc import Iterator

from lora_cache.key import AdapterKey
from lora_cache.policies.base import RemovalReason
from lora_cache.policies.ranking import Ranking


class GDSF:
    """Evicts what is worth least per byte: ``clock + uses · cost_s / nbytes``.

    The clock is the worth of the last victim.  Each use adds it anew, so what is not used any more
    is overtaken by newcomers however often it was used once, and no time has to be measured
    (Cherkasova, HPL-98-69R1, 1998).  Among equals the least recently used goes.  Uses are
    forgotten when the copy leaves the tier.  Calls are O(log n) amortised.

    The use that a copy was loaded for is its first: insert and access count once together.  In a
    tier that charges no bytes (slots are all of one size) every copy counts as one byte.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._copies: dict[AdapterKey, tuple[int, float, int]] = {}  # uses, cost_s, nbytes
        self._unused: set[AdapterKey] = set()  # since they were inserted
        self._ranking = Ranking()

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        self._unused.add(key)
        self._rank(key, 1, cost_s, max(nbytes, 1))

    def on_access(self, key: AdapterKey, now: float) -> None:
        uses, cost_s, nbytes = self._copies[key]
        again = key not in self._unused
        self._unused.discard(key)
        self._rank(key, uses + again, cost_s, nbytes)

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        worth = self._ranking.remove(key)
        del self._copies[key]
        self._unused.discard(key)
        if reason is RemovalReason.EVICTED:
            # Never back: the planner may have passed over a cheaper one, and takes it later.
            self._clock = max(self._clock, worth)

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter(self._ranking)

    def explain(self, key: AdapterKey, now: float) -> str:
        uses, cost_s, nbytes = self._copies[key]
        return f"{uses} uses × {cost_s:.3g} s to load / {nbytes} bytes"

    def _rank(self, key: AdapterKey, uses: int, cost_s: float, nbytes: int) -> None:
        self._copies[key] = uses, cost_s, nbytes
        self._ranking.put(key, self._clock + uses * cost_s / nbytes)
