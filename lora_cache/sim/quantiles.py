"""Quantiles of a stream of times, in a memory that does not grow with it."""

from __future__ import annotations

import math
from collections import Counter

_GROWTH = math.log(1.02)


class Quantiles:
    """Counts times in buckets, each 2 % wider than the one before: a quantile is right to 1 %."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._zeros = 0
        self._count = 0

    def add(self, seconds: float) -> None:
        """Count one time, at least 0."""
        self._count += 1
        if seconds > 0:
            self._buckets[math.floor(math.log(seconds) / _GROWTH)] += 1
        else:
            self._zeros += 1

    def quantile(self, share: float) -> float:
        """The least time that at least `share` of the times do not exceed, in seconds."""
        below = self._zeros
        wanted = share * self._count
        if below >= wanted:
            return 0.0
        for bucket in sorted(self._buckets):
            below += self._buckets[bucket]
            if below >= wanted:
                break
        return math.exp((bucket + 0.5) * _GROWTH)
