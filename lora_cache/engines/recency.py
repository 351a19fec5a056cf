"""What vLLM's own slot LRU must look like, deduced from the commands that it was sent.

vLLM evicts the adapter whose slot was touched longest ago.  Commands touch (`add_lora` of a
resident adapter), and so does every step that runs a request.  From outside, the last touch of
an adapter is known only to lie in an interval of *events*: not before the last command or
request that certainly touched it was sent, not after its last request was seen to end.  To make
vLLM evict a given victim it suffices to touch every other adapter that is not certainly newer
than it; under an LRU policy that is usually none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_cache.key import AdapterKey


@dataclass(slots=True)
class _Slot:
    key: AdapterKey
    earliest: int  # its last touch did not come before this event
    latest: int  # nor after this one, unless it is in use


class SlotMirror:
    """vLLM's slots: who sits in which, and how recently each was surely touched.

    A newcomer takes the lowest free index, or the index of the one that vLLM evicts for it.
    """

    def __init__(self, slots: int) -> None:
        self._table: list[_Slot | None] = [None] * slots
        self._index: dict[AdapterKey, int] = {}
        self._uses: dict[AdapterKey, int] = {}
        self._event = 0

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._index

    @property
    def is_full(self) -> bool:
        return len(self._index) == len(self._table)

    def slots(self) -> dict[int, AdapterKey]:
        """Slot index → key."""
        return {i: slot.key for i, slot in enumerate(self._table) if slot}

    def event(self) -> int:
        """The number of a new event, later than all before: "this command is being sent"."""
        self._event += 1
        return self._event

    def begin_use(self, key: AdapterKey) -> None:
        """Requests may run with `key` from now on."""
        self._uses[key] = self._uses.get(key, 0) + 1

    def end_use(self, key: AdapterKey) -> None:
        """One user of `key` has seen its last request end."""
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            if slot := self._slot(key):
                slot.latest = self.event()

    def ran(self, key: AdapterKey, sent: int) -> None:
        """A request that was sent at event `sent` has run at least one step with `key`."""
        if slot := self._slot(key):
            slot.earliest = max(slot.earliest, sent)

    def touched(self, key: AdapterKey, sent: int) -> None:
        """A command that was sent at event `sent` has touched `key`."""
        if slot := self._slot(key):
            slot.earliest = max(slot.earliest, sent)
            slot.latest = self.event()

    def older_than(self, victim: AdapterKey) -> list[AdapterKey]:
        """Keys to touch so that `victim` becomes the oldest: all that may be older than it."""
        slot = self._slot(victim)
        if slot is None:
            raise KeyError(f"{victim} is in no slot")
        bound = math.inf if victim in self._uses else slot.latest
        others = [other for other in self._table if other and other is not slot]
        return [other.key for other in others if other.earliest <= bound]

    def activated(self, key: AdapterKey, victim: AdapterKey | None, sent: int) -> None:
        """A command sent at event `sent` wrote `key` into the slot of `victim`, or a free one."""
        if victim is not None:
            self.removed(victim)
        index = self._table.index(None)
        self._table[index] = _Slot(key, sent, self.event())
        self._index[key] = index

    def removed(self, key: AdapterKey) -> None:
        """`key` has no slot any more (it may not have had one)."""
        index = self._index.pop(key, None)
        if index is not None:
            self._table[index] = None

    def _slot(self, key: AdapterKey) -> _Slot | None:
        index = self._index.get(key)
        return None if index is None else self._table[index]
