"""LRU-2: least recently used *twice*."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.policies.base import RemovalReason
from lora_cache.policies.ranking import Ranking

_NEVER = -1


class LRUK:
    """Evicts the copy whose last use but one is longest ago (O'Neil et al., SIGMOD 1993, K = 2).

    What was used once only goes first, the least recently used of it before the others.  The
    last use is remembered when a copy leaves, so an adapter that keeps coming back is known by its
    rhythm and not taken for a new one.  Calls are O(log n) amortised.

    The use that a copy was loaded for is one use: insert and access count once together, and an
    insert that no access follows (a prefetch) counts until the copy leaves, then not at all.

    Args:
        history: adapters out of the tier whose last use is remembered; the one that left first is
            forgotten first.  0 remembers none, as in many simulators.

    Raises:
        ConfigError: `history` is negative.
    """

    def __init__(self, history: int = 4096) -> None:
        if history < 0:
            raise ConfigError(f"history must not be negative, as {history} is")
        self._max_history = history
        self._history: OrderedDict[AdapterKey, int] = OrderedDict()  # last use of what has left
        self._last: dict[AdapterKey, int] = {}  # last use, or the insert, of what is resident
        self._unused: set[AdapterKey] = set()  # since they were inserted
        self._ranking = Ranking()  # by last use but one
        # Uses are numbered, not timed: only their order matters, and that of two at one time too.
        self._uses = count()

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        self._ranking.put(key, self._history.pop(key, _NEVER))
        self._last[key] = next(self._uses)
        self._unused.add(key)

    def on_access(self, key: AdapterKey, now: float) -> None:
        if key in self._unused:  # the use that the insert announced
            self._unused.remove(key)
            self._ranking.put(key, self._ranking.score(key))
        else:
            self._ranking.put(key, self._last[key])
        self._last[key] = next(self._uses)

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        before = int(self._ranking.remove(key))
        last = self._last.pop(key)
        if key in self._unused:
            self._unused.remove(key)
            last = before
        if last != _NEVER:
            self._history[key] = last
            if len(self._history) > self._max_history:
                self._history.popitem(last=False)

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter(self._ranking)

    def explain(self, key: AdapterKey, now: float) -> str:
        if self._ranking.score(key) == _NEVER:
            return "used once"
        return "its last use but one ranks it"
