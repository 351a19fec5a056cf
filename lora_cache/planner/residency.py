"""Both tiers together: what is where, what protects it, and how room is made.

The tiers are inclusive: every copy in a slot has one in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from itertools import islice
from math import inf

from lora_cache.errors import NoRoomError, UnsupportedAdapterError
from lora_cache.key import AdapterKey
from lora_cache.planner.actions import Choice, Limits, Transition, make_transition
from lora_cache.planner.pins import Pins
from lora_cache.planner.tiers import TierTable
from lora_cache.planner.waiting import Demand
from lora_cache.policies import Policy, RemovalReason, explain
from lora_cache.state import Copy, CopyState, Tier

# Looked up once: in Python 3.11 an attribute of an Enum takes as long as three calls.
_GPU, _HOST, _DISK = Tier
_READY, _DRAINING = CopyState.READY, CopyState.DRAINING


#: Victims that let a newcomer in: who gives up a slot, who leaves host memory.
Room = tuple[tuple[AdapterKey, ...], tuple[AdapterKey, ...]]


class Residency:
    """The slot tier and the host tier, with the leases, pins and unloads that protect copies.

    Args:
        awaited: keys that somebody waits for.
    """

    def __init__(
        self,
        limits: Limits,
        gpu_policy: Policy,
        host_policy: Policy,
        awaited: Container[AdapterKey] = (),
    ) -> None:
        self.gpu = TierTable(_GPU, gpu_policy, limits.slots)
        self.host = TierTable(_HOST, host_policy, limits.host_entries, limits.host_bytes)
        self.pins = Pins(limits)
        self.leases: dict[AdapterKey, int] = {}
        self.unloading: dict[AdapterKey, list[int]] = {}  # tickets by key
        self._awaited = awaited
        self._slot_cost_s = inf  # of late, from host memory into a slot
        #: False only if `draining` is empty: asked after every event, without a walk.
        self.may_drain = False

    def is_ready(self, key: AdapterKey, tier: Tier) -> bool:
        return (self.gpu if tier is _GPU else self.host).is_ready(key)

    def has(self, key: AdapterKey, tier: Tier) -> bool:
        """There is a copy, in whatever state."""
        return key in (self.gpu if tier is _GPU else self.host)

    def is_moving(self, key: AdapterKey) -> bool:
        """A transition in flight moves a copy of `key`."""
        slot, held = self.gpu.get(key), self.host.get(key)
        return bool((slot and slot.op) or (held and held.op))

    def found_in(self, key: AdapterKey) -> Tier:
        if key in self.gpu.copies:
            return _GPU
        return _HOST if key in self.host.copies else _DISK

    # ------------------------------------------------------------------ leases

    def add_lease(self, key: AdapterKey, now: float) -> None:
        leases = self.leases
        leases[key] = leases[key] + 1 if key in leases else 1
        self.gpu.policy.on_access(key, now)
        self.host.policy.on_access(key, now)  # a slot hit refreshes host recency

    def drop_lease(self, key: AdapterKey) -> bool:
        """Returns True when that was the last lease of `key`."""
        left = self.leases[key] - 1
        if left:
            self.leases[key] = left
            return False
        del self.leases[key]
        return True

    # ------------------------------------------------------------------ draining a slot

    def drain(self, key: AdapterKey, now: float) -> None:
        """The copy in the slot, if any, takes no new leases."""
        slot = self.gpu.get(key)
        if slot is not None and slot.op is None and slot.state is _READY:
            slot.move(_DRAINING, now)
            self.may_drain = True

    def undrain(self, key: AdapterKey, now: float) -> None:
        slot = self.gpu.get(key)
        if slot is not None and slot.op is None and slot.state is _DRAINING:
            slot.move(_READY, now)

    def draining(self) -> list[AdapterKey]:
        """Keys that were set aside and are not moving yet."""
        if not self.may_drain:
            return []
        found = [c.key for c in self.gpu if c.state is _DRAINING and c.op is None]
        self.may_drain = bool(found)
        return found

    def balance_drains(self, wanted: int, now: float) -> tuple[int, list[AdapterKey]]:
        """Have `wanted` copies set aside, those of unloads included.

        Returns:
            how many more are, and which need not be any longer (for the caller to undrain).
        """
        draining = self.draining()
        missing = wanted - len(draining)
        if missing < 0:
            mine = [key for key in draining if key not in self.unloading]
            return 0, mine[missing:]
        chosen = list(islice(self.gpu.ranked(self._may_drain, now), missing)) if missing else ()
        for key in chosen:
            self.drain(key, now)
        return len(chosen), []

    def _may_drain(self, slot: Copy) -> bool:
        return slot.state is _READY and not slot.op and slot.key not in self.pins.gpu

    # ------------------------------------------------------------------ making room

    def make_room(
        self, key: AdapterKey, nbytes: int, slot: bool, gently: bool, now: float
    ) -> Room | None:
        """Choose the victims that let `key` in; None when it cannot be done now.  Pure.

        Args:
            nbytes: host bytes of the newcomer (ignored when it is in host memory already).
            slot: it needs a slot.
            gently: no slot is given up for host bytes alone, and nothing that somebody waits for.
        """
        demote = self.gpu.room_for(0, self._may_leave_slot, now) if slot else []
        if demote is None or key in self.host.copies:
            return None if demote is None else (tuple(demote), ())
        needed = len(demote)
        while True:
            # A host victim never sits in a slot, unless it gives that slot up in the same move.
            may_leave = self._may_leave_host(frozenset(demote), spares_awaited=gently)
            drop = self.host.room_for(nbytes, may_leave, now)
            if drop is not None:
                extra_too = (k for k in demote[needed:] if k in drop)
                return (*demote[:needed], *extra_too), tuple(drop)
            idle = () if gently else self.gpu.ranked(self._may_leave_slot, now)
            extra = next((key for key in idle if key not in demote), None)
            if extra is None:
                return None
            demote.append(extra)

    def surplus(self, now: float) -> list[AdapterKey]:
        """Who must leave host memory to come down to its target, as far as they may.  Pure."""
        return self.host.beyond_target(self._may_leave_host(frozenset()), now)

    def _may_leave_slot(self, slot: Copy) -> bool:
        if slot.op:
            return False
        key = slot.key
        return not (key in self.leases or key in self.pins.gpu or key in self.unloading)

    def _may_leave_host(
        self, demoted: frozenset[AdapterKey], *, spares_awaited: bool = False
    ) -> Callable[[Copy], bool]:
        def may_leave(held: Copy) -> bool:
            key = held.key
            in_slot = key in self.gpu.copies and key not in demoted
            protected = key in self.leases or key in self.pins or key in self.unloading
            awaited = spares_awaited and key in self._awaited
            return not (held.op or in_slot or protected or awaited)

        return may_leave

    def too_large(self, key: AdapterKey, nbytes: int) -> UnsupportedAdapterError | None:
        """Why `key` can never be brought in, whoever leaves, if that is so."""
        budget = self.host.max_bytes
        if budget is None or key in self.host.copies:
            return None
        pinned = sum(copy.nbytes for copy in self.host if copy.key in self.pins)
        if nbytes + pinned <= budget:
            return None
        beside = f" beside {pinned} bytes that are pinned" if pinned else ""
        return UnsupportedAdapterError(
            f"{key} needs {nbytes} bytes of host memory and the budget is {budget}{beside}: "
            "raise host_bytes",
            key=key,
            tier=_HOST,
        )

    # ------------------------------------------------------------------ transitions

    def bring_in(
        self, ops: Iterator[int], demand: Demand, slot: bool, gently: bool, now: float
    ) -> Transition | None:
        """Set aside what it takes to load an adapter, in both tiers; None when it cannot be now.

        Args:
            ops: where the number of the transition comes from.
            slot, gently: as in `make_room`.
        """
        key, nbytes = demand.key, demand.nbytes
        room = self.make_room(key, nbytes, slot, gently, now)
        if room is None:
            return None
        op, (demote, drop) = next(ops), room
        leaving = demote if not drop else self._in_slots(*demote, *drop)
        self.gpu.begin(op, key if slot else None, 0, leaving, now)
        if key not in self.host.copies:
            self.host.begin(op, key, nbytes, drop, now)
        urgent = demand.tier is _GPU
        return make_transition((op, key, _GPU if slot else _HOST, demote, drop, urgent))

    def begin_drop(self, move: Transition, now: float) -> None:
        """Set aside what leaves host memory, and its slots with it."""
        self.gpu.begin(move.op, None, 0, self._in_slots(*move.drop), now)
        held = [key for key in move.drop if key in self.host.copies]
        self.host.begin(move.op, None, 0, held, now)

    def _in_slots(self, *keys: AdapterKey) -> Iterable[AdapterKey]:
        return dict.fromkeys(key for key in keys if key in self.gpu.copies)

    def commit(
        self,
        op: int,
        reason: RemovalReason,
        cost_s: float,
        now: float,
        from_host: bool,
        nbytes: int | None,
    ) -> tuple[int, int]:
        """The transition happened.  Returns how many copies left (slots, host memory).

        Args:
            nbytes: what the newcomer takes in host memory, if known by now.
        """
        usual_s = self._slot_cost_s
        if from_host:
            usual_s = cost_s if usual_s == inf else usual_s + 0.1 * (cost_s - usual_s)
            self._slot_cost_s = usual_s
        # Who leaves a slot stays in host memory: at stake is the way back, not the load from disk.
        slot_cost_s = cost_s if cost_s < usual_s else usual_s
        left_gpu = self.gpu.commit(op, reason, slot_cost_s, now)
        left_host = self.host.commit(op, reason, cost_s, now, nbytes) if self.host.claims else 0
        return left_gpu, left_host

    def order_of_leaving(self, tier: Tier, now: float) -> Iterator[AdapterKey]:
        """Who may leave `tier`, the first one first.  Pure."""
        if tier is _GPU:
            return self.gpu.ranked(self._may_leave_slot, now)
        return self.host.ranked(self._may_leave_host(frozenset()), now)

    def choices(self, move: Transition, now: float) -> tuple[Choice, ...]:
        """Why the victims of a transition that has just begun, and who would be next.  Pure."""
        return (
            *_choices(self.gpu, move.demote, self.order_of_leaving(_GPU, now), now),
            *_choices(self.host, move.drop, self.order_of_leaving(_HOST, now), now),
        )

    def abort(
        self, op: int, gone: frozenset[AdapterKey], dropped: frozenset[AdapterKey], now: float
    ) -> None:
        """The transition failed, but for what is `gone` from slots and `dropped` from host."""
        self.gpu.abort(op, gone | dropped, now)
        self.host.abort(op, dropped, now)
        for key in dropped & self.host.copies.keys():  # of the newcomer, if it was there before
            self.host.lose(key, now)


def _choices(
    table: TierTable, victims: Iterable[AdapterKey], others: Iterator[AdapterKey], now: float
) -> Iterator[Choice]:
    policy, runner_up, reason = table.policy, None, ""
    if victims and (runner_up := next(others, None)):
        reason = explain(policy, runner_up, now)
    for victim in victims:
        yield Choice(table.tier, victim, explain(policy, victim, now), runner_up, reason)


def no_room(key: AdapterKey) -> NoRoomError:
    """What somebody who only wanted to stage `key` is told."""
    return NoRoomError(
        f"no room to stage {key} without disturbing others: it stays on disk", key=key, tier=_HOST
    )
