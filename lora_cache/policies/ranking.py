"""Keys in order of a score that changes: what the policies that count have in common."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

from lora_cache.key import AdapterKey

_Entry = tuple[float, int, AdapterKey]  # score, number of the `put`, key


class Ranking:
    """Keys, the lowest score first; among equals, the one that was put first.

    `put` and `remove` are O(log n), the first key of an iteration O(1), each further one
    O(log n), all of it amortised.  Iterating changes nothing.
    """

    def __init__(self) -> None:
        self._entries: dict[AdapterKey, _Entry] = {}
        # A new score is pushed and the old entry left where it is: finding it would be O(n).  What
        # is not in `_entries` any more is outdated; the first of the heap never is.
        self._heap: list[_Entry] = []
        self._puts = count()

    def put(self, key: AdapterKey, score: float) -> None:
        """Rank `key` by `score`, behind all that have the same; it may be ranked already."""
        entry = self._entries[key] = (score, next(self._puts), key)
        heapq.heappush(self._heap, entry)
        self._tidy()

    def remove(self, key: AdapterKey) -> float:
        """Take `key` out.  Returns its score."""
        score, _, _ = self._entries.pop(key)
        self._tidy()
        return score

    def score(self, key: AdapterKey) -> float:
        return self._entries[key][0]

    def __iter__(self) -> Iterator[AdapterKey]:
        # The k lowest of a heap without touching it: whoever comes next is a child of somebody
        # who came before.  The number of a `put` is unique, so keys are never compared.
        frontier = [(entry, 0) for entry in self._heap[:1]]
        while frontier:
            entry, index = heapq.heappop(frontier)
            if self._entries.get(entry[2]) is entry:
                yield entry[2]
            for child in range(2 * index + 1, min(2 * index + 3, len(self._heap))):
                heapq.heappush(frontier, (self._heap[child], child))

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + 8:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
        while self._heap and self._entries.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
