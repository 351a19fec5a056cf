"""What vLLM's own slot LRU must look like, deduced from the commands that it was sent.

vLLM evicts the adapter whose slot was touched longest ago.  Commands touch (`add_lora` of a
resident adapter), and so does every step that runs a request.  From outside, the last touch of
an adapter is known only to lie in an interval of *event numbers*: not before the last command or
request that certainly touched it, not after the moment when its last request was seen to end.
To make vLLM evict a given victim, it suffices to touch every other adapter that is not certainly
newer than it; under an LRU policy that is usually none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_cache.adapter import AdapterKey


@dataclass(slots=True)
class _Slot:
    key: AdapterKey
    earliest: float  # its last touch did not come before this event
    latest: float  # nor after this one; inf while requests may run
    uses: int = 0


class SlotMirror:
    """vLLM's slots: who sits in which, and how recently each was surely touched.

    A newcomer takes the lowest free index, or the index of the one that vLLM evicts for it.
    """

    def __init__(self, slots: int) -> None:
        self._table: list[_Slot | None] = [None] * slots
        self._of: dict[AdapterKey, int] = {}
        self._event = 0

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._of

    @property
    def is_full(self) -> bool:
        return len(self._of) == len(self._table)

    def slots(self) -> dict[int, AdapterKey]:
        """Slot index → key."""
        return {i: slot.key for i, slot in enumerate(self._table) if slot}

    def now(self) -> int:
        """The number of a new event, later than all before."""
        self._event += 1
        return self._event

    def begin_use(self, key: AdapterKey) -> None:
        """Requests may run with `key` from now on."""
        if slot := self._slot(key):
            slot.uses += 1
            slot.latest = math.inf

    def end_use(self, key: AdapterKey) -> None:
        """One user of `key` has seen its last request end."""
        if slot := self._slot(key):
            slot.uses -= 1
            if not slot.uses:
                slot.latest = self.now()

    def ran(self, key: AdapterKey, since: float) -> None:
        """A request that was sent at event `since` has run at least one step with `key`."""
        if slot := self._slot(key):
            slot.earliest = max(slot.earliest, since)

    def touched(self, key: AdapterKey) -> None:
        """A command that touches `key` was carried out."""
        if slot := self._slot(key):
            slot.earliest = self.now()
            slot.latest = max(slot.latest, slot.earliest)

    def older_than(self, victim: AdapterKey) -> list[AdapterKey]:
        """Keys to touch, so that `victim` becomes the oldest."""
        bound = self._require(victim).latest
        others = [slot for slot in self._table if slot and slot.key != victim]
        return [slot.key for slot in others if slot.earliest <= bound]

    def activated(self, key: AdapterKey, victim: AdapterKey | None) -> None:
        """`key` was written into a slot: that of `victim`, or the lowest free one."""
        if victim is not None:
            self.removed(victim)
        index = self._table.index(None)
        event = self.now()
        self._table[index] = _Slot(key, event, event)
        self._of[key] = index

    def removed(self, key: AdapterKey) -> None:
        """`key` has no slot any more (it may not have had one)."""
        index = self._of.pop(key, None)
        if index is not None:
            self._table[index] = None

    def _slot(self, key: AdapterKey) -> _Slot | None:
        index = self._of.get(key)
        return None if index is None else self._table[index]

    def _require(self, key: AdapterKey) -> _Slot:
        slot = self._slot(key)
        if slot is None:
            raise KeyError(f"{key} is in no slot")
        return slot
