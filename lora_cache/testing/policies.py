"""A policy that picks victims at random: the hardest one for an engine to obey."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lora_cache.adapter import AdapterKey
from lora_cache.policies import RemovalReason


class RandomPolicy:
    """Ranks victims in a random order that changes with every notification, and only then."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._order: dict[AdapterKey, float] = {}

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        self._order[key] = self._random.random()

    def on_access(self, key: AdapterKey, now: float) -> None:
        self._order[key] = self._random.random()

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        del self._order[key]

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter(sorted(self._order, key=lambda key: self._order[key]))
