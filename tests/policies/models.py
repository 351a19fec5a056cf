"""Eviction policies written down as their papers say, without a thought for speed.

Each is a cache of its own that is told its capacity, unlike the project's, which are only notified.
`request` returns the victims; `misses` counts.
"""

from __future__ import annotations

from collections.abc import Callable


class SLRUModel:
    """Two lists, least recently used first; `protected` may hold 4/5 of the capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.limit = capacity, capacity * 4 // 5
        self.probation: list[int] = []
        self.protected: list[int] = []
        self.misses = 0

    def request(self, number: int) -> list[int]:
        if number in self.protected:
            self.protected.remove(number)
            self.protected.append(number)
            return []
        if number in self.probation:
            self.probation.remove(number)
            self.protected.append(number)
            while len(self.protected) > self.limit:
                self.probation.append(self.protected.pop(0))
            return []
        self.misses += 1
        victims = []
        if len(self.probation) + len(self.protected) == self.capacity:
            victims.append((self.probation or self.protected).pop(0))
        self.probation.append(number)
        return victims


class LRU2Model:
    """All uses of every adapter that ever came, and a list of those that are remembered."""

    def __init__(self, capacity: int, history: int) -> None:
        self.capacity, self.history = capacity, history
        self.uses: dict[int, list[int]] = {}
        self.resident: set[int] = set()
        self.left: list[int] = []
        self.time = self.misses = 0

    def distance(self, number: int) -> tuple[int, int]:
        """Sorts those that were used once before the others, then by age."""
        uses = self.uses[number]
        return (uses[-2], uses[-1]) if len(uses) > 1 else (-1, uses[-1])

    def request(self, number: int) -> list[int]:
        self.time += 1
        victims = []
        if number not in self.resident:
            self.misses += 1
            if len(self.resident) == self.capacity:
                victim = min(self.resident, key=self.distance)
                victims.append(victim)
                self.resident.remove(victim)
                self.left.append(victim)
                # The newcomer is taken out below, but it was remembered until now.
                for forgotten in self.left[: -self.history or None]:
                    self.left.remove(forgotten)
                    del self.uses[forgotten]
            self.resident.add(number)
            if number in self.left:
                self.left.remove(number)
        self.uses.setdefault(number, []).append(self.time)
        return victims


class GDSFModel:
    """Worth by number; several may have to leave for one."""

    def __init__(
        self, budget: int, nbytes: Callable[[int], int], cost_s: Callable[[int], float]
    ) -> None:
        self.budget, self.nbytes, self.cost_s = budget, nbytes, cost_s
        self.clock = 0.0
        self.uses: dict[int, int] = {}
        self.worth: dict[int, tuple[float, int]] = {}
        self.time = self.misses = 0

    def request(self, number: int) -> list[int]:
        self.time += 1
        victims = []
        if number not in self.worth:
            self.misses += 1
            while sum(map(self.nbytes, self.worth)) + self.nbytes(number) > self.budget:
                victim = min(self.worth, key=lambda other: self.worth[other])
                self.clock, _ = self.worth.pop(victim)
                del self.uses[victim]
                victims.append(victim)
        self.uses[number] = self.uses.get(number, 0) + 1
        worth = self.clock + self.uses[number] * self.cost_s(number) / self.nbytes(number)
        self.worth[number] = (worth, self.time)
        return victims
