"""Least frequently used, with exponential ageing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.policies.base import RemovalReason
from lora_cache.policies.ranking import Ranking


class LFU:
    """Evicts the lowest decayed count of uses; among equals, the least recently used.

    A use counts 1 and halves every `half_life_s`.  Because all counts shrink at one rate, their
    order changes only when one is used: the logarithm of a count, taken back to time zero, is a
    fixed number ("forward decay", Cormode et al., ICDE 2009), and no clock has to run.  Counts
    are forgotten when the copy leaves the tier.  Calls are O(log n) amortised.

    Args:
        half_life_s: seconds; ``math.inf`` (plain LFU) keeps every use for ever.

    Raises:
        ConfigError: `half_life_s` is not positive.
    """

    def __init__(self, half_life_s: float = 600.0) -> None:
        if not half_life_s > 0:
            raise ConfigError(f"half_life_s must be positive (or inf), not {half_life_s}")
        self._half_life_s = half_life_s
        self._ranking = Ranking()  # by log2(count) at time zero

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        # A prefetched adapter is a promise of use: as one use, it is not the next victim at once.
        self._ranking.put(key, self._landmark(now))

    def on_access(self, key: AdapterKey, now: float) -> None:
        weight = self._ranking.score(key)
        new = self._landmark(now)
        high, low = max(weight, new), min(weight, new)
        self._ranking.put(key, high + math.log2(1.0 + 2.0 ** (low - high)))

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        self._ranking.remove(key)

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter(self._ranking)

    def explain(self, key: AdapterKey, now: float) -> str:
        uses = 2.0 ** (self._ranking.score(key) - self._landmark(now))
        return f"{uses:.3g} uses, each halved every {self._half_life_s:g} s"

    def _landmark(self, now: float) -> float:
        """log2 of a use at `now`, as it would have to weigh at time zero."""
        return now / self._half_life_s
