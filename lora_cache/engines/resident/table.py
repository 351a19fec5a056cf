"""Which adapter is in which slot, and who may change it right now.

Two threads meet here.  The *step thread* is vLLM's: it asks for the adapters of a batch, and brings
in itself what is missing.  The *agent thread* fills slots in between.  The rules:

* Whoever writes a slot holds it, and while it is held it is not published.
* The agent takes no slot whose adapter the batch in preparation needs; the step thread takes no
  slot of its own batch.
* A slot that the agent holds but has not begun to write can be called back by the step thread:
  untouched, its old adapter is still good.

Ids are positive; 0 stands for none, as on the wire.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

#: How often a waiting agent looks whether it is to stop.
_POLL_S = 0.05


class SlotTakenError(Exception):
    """The slot does not hold what was expected, so nothing was done."""


class StoppedError(Exception):
    """The agent was told to stop while it waited."""


@dataclass(slots=True)
class Hold:
    """The right to write a slot, until it is published, released or called back."""

    slot: int
    old_id: int
    last_used_step: int  #: the slot may be overwritten when this step has finished
    writing: bool = False
    called_back: bool = False


class SlotTable:
    """The table; every method is thread-safe, none does I/O.

    Args:
        slots: how many there are.
        stopped: waiting calls of the agent end with `StoppedError` soon after it says so.
    """

    def __init__(self, slots: int, stopped: Callable[[], bool] = lambda: False) -> None:
        self._changed = threading.Condition()
        self._ids = [0] * slots
        self._last_used = [0] * slots
        self._used_at = [-math.inf] * slots  # by a batch, since it was published
        self._held: dict[int, Hold] = {}
        self._preparing: frozenset[int] = frozenset()
        self._stopped = stopped

    def ids(self) -> list[int]:
        """The published id of each slot."""
        with self._changed:
            return list(self._ids)

    def recent(self, within_s: float) -> list[int]:
        """The published ids that a batch needed within the last seconds."""
        with self._changed:
            since = time.monotonic() - within_s
            used = zip(self._ids, self._used_at, strict=True)
            return [lora_id for lora_id, at in used if lora_id and at >= since]

    # --- the agent's ---------------------------------------------------------------------

    def take(self, slot: int, expected: int) -> Hold:
        """Unpublish a slot in order to write it.

        Waits while a batch that needs its adapter is being prepared, or the step thread writes it.

        Raises:
            SlotTakenError: it does not hold `expected`.
            StoppedError: see the class.
        """
        with self._changed:
            if not 0 <= slot < len(self._ids):
                raise SlotTakenError(f"there is no slot {slot}; there are {len(self._ids)}")
            while slot in self._held or (self._ids[slot] and self._ids[slot] in self._preparing):
                if self._stopped():
                    raise StoppedError
                self._changed.wait(_POLL_S)
            if self._ids[slot] != expected:
                raise SlotTakenError(
                    f"slot {slot} holds {self._ids[slot] or 'nothing'}, not {expected or 'nothing'}"
                )
            self._ids[slot] = 0
            self._held[slot] = Hold(slot, expected, self._last_used[slot])
            return self._held[slot]

    def begin_writing(self, hold: Hold) -> bool:
        """From here on the slot cannot be called back; false if it already was."""
        with self._changed:
            hold.writing = not hold.called_back
            return hold.writing

    def publish(self, hold: Hold, lora_id: int) -> None:
        """The slot is written: batches may use it.

        Raises:
            SlotTakenError: the adapter has come into another slot meanwhile; the slot is free.
        """
        with self._changed:
            self._let_go(hold)
            if lora_id in self._ids:
                raise SlotTakenError(f"{lora_id} is in slot {self._ids.index(lora_id)} already")
            self._ids[hold.slot] = lora_id
            self._used_at[hold.slot] = -math.inf

    def release(self, hold: Hold) -> None:
        """Free a slot that was not written, or not to the end."""
        with self._changed:
            if not hold.called_back:
                self._let_go(hold)

    def _let_go(self, hold: Hold) -> None:
        del self._held[hold.slot]
        self._changed.notify_all()

    # --- anybody's -----------------------------------------------------------------------

    def unpublish(self, lora_ids: Collection[int]) -> list[tuple[int, int]]:
        """Publish these no longer; steps in flight go on reading what is left in the slots.

        A batch in preparation that needs one of them is waited for.

        Returns:
            (slot, id) of those that were published.
        """
        with self._changed:
            while self._preparing.intersection(lora_ids):
                if self._stopped():
                    raise StoppedError
                self._changed.wait(_POLL_S)
            gone = [(slot, held) for slot, held in enumerate(self._ids) if held in lora_ids]
            gone = [(slot, held) for slot, held in gone if held]
            for slot, _ in gone:
                self._ids[slot] = 0
            self._changed.notify_all()
            return gone

    # --- the step thread's ---------------------------------------------------------------

    def prepare(self, batch: Collection[int], step: int) -> list[int]:
        """Begin to prepare a batch: until `prepared`, none of it leaves its slot.

        Slots that the agent took from one of the batch and has not begun to write are called back.

        Returns:
            The ids that are in no slot.
        """
        with self._changed:
            self._preparing = frozenset(batch)
            for hold in [hold for hold in self._held.values() if hold.old_id in self._preparing]:
                if not hold.writing and hold.old_id not in self._ids:
                    self._call_back(hold)
                    self._ids[hold.slot] = hold.old_id
            for slot, lora_id in enumerate(self._ids):
                if lora_id in self._preparing:
                    self._last_used[slot] = step
                    self._used_at[slot] = time.monotonic()
            return [lora_id for lora_id in batch if lora_id not in self._ids]

    def prepared(self) -> None:
        """The batch is prepared: its slots may be taken, to be written when its step is over."""
        with self._changed:
            self._preparing = frozenset()
            self._changed.notify_all()

    def reserve(self, step: int) -> Hold | None:
        """A slot for one that `prepare` missed: a free one, else the idle one used longest ago.

        Waits while the agent writes the only candidate, which takes it milliseconds.

        Returns:
            The slot, unpublished and held; none if the whole table belongs to the batch.
        """
        with self._changed:
            while True:
                hold = self._candidate()
                if hold is not None:
                    self._ids[hold.slot] = 0
                    self._last_used[hold.slot] = step
                    self._held[hold.slot] = hold
                    return hold
                if not self._held:
                    return None
                self._changed.wait(_POLL_S)

    def reserve_free(self, step: int) -> Hold | None:
        """A free slot, or none."""
        with self._changed:
            for slot, lora_id in enumerate(self._ids):
                if not lora_id and slot not in self._held:
                    self._held[slot] = Hold(slot, 0, self._last_used[slot], writing=True)
                    self._last_used[slot] = step
                    return self._held[slot]
            return None

    def used(self, step: int) -> None:
        """Every slot may be read by steps up to this one: nothing else is known."""
        with self._changed:
            self._last_used = [step] * len(self._last_used)

    def _candidate(self) -> Hold | None:
        open_slots = [slot for slot in range(len(self._ids)) if slot not in self._held]
        free = [slot for slot in open_slots if not self._ids[slot]]
        idle = [slot for slot in open_slots if self._ids[slot] not in self._preparing]
        for slots in (free, idle):
            if slots:
                slot = min(slots, key=self._last_used.__getitem__)
                return Hold(slot, self._ids[slot], self._last_used[slot], writing=True)
        for hold in list(self._held.values()):
            if not hold.writing:
                self._call_back(hold)
                return Hold(hold.slot, hold.old_id, hold.last_used_step, writing=True)
        return None

    def _call_back(self, hold: Hold) -> None:
        hold.called_back = True
        del self._held[hold.slot]
        self._changed.notify_all()


def as_index(ids: Sequence[int]) -> list[int | None]:
    """The table as vLLM writes it: slot → id or None."""
    return [lora_id or None for lora_id in ids]
