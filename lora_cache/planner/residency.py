"""Both tiers together: what is where, what protects it, and how room is made.

The tiers are inclusive: every copy in a slot has one in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from lora_cache.errors import UnsupportedAdapterError
from lora_cache.key import AdapterKey
from lora_cache.planner.actions import Limits, Transition
from lora_cache.planner.pins import Pins
from lora_cache.planner.tiers import TierTable
from lora_cache.policies import Policy, RemovalReason
from lora_cache.state import Copy, CopyState, Tier


class Room(NamedTuple):
    """Victims that let a newcomer in: who gives up a slot, who leaves host memory."""

    demote: list[AdapterKey]
    drop: list[AdapterKey]


class Residency:
    """The slot tier and the host tier, with the leases, pins and unloads that protect copies."""

    def __init__(self, limits: Limits, gpu_policy: Policy, host_policy: Policy) -> None:
        self.gpu = TierTable(Tier.GPU, gpu_policy, limits.slots)
        self.host = TierTable(Tier.HOST, host_policy, limits.host_entries, limits.host_bytes)
        self.pins = Pins(limits)
        self.leases: dict[AdapterKey, int] = {}
        self.unloading: dict[AdapterKey, list[int]] = {}  # tickets by key

    def is_ready(self, key: AdapterKey, tier: Tier) -> bool:
        return (self.gpu if tier is Tier.GPU else self.host).is_ready(key)

    def has(self, key: AdapterKey, tier: Tier) -> bool:
        """There is a copy, in whatever state."""
        return key in (self.gpu if tier is Tier.GPU else self.host)

    def is_moving(self, key: AdapterKey) -> bool:
        """A transition in flight moves a copy of `key`."""
        slot, held = self.gpu.get(key), self.host.get(key)
        return bool((slot and slot.op) or (held and held.op))

    def found_in(self, key: AdapterKey) -> Tier:
        if key in self.gpu:
            return Tier.GPU
        return Tier.HOST if key in self.host else Tier.DISK

    # ------------------------------------------------------------------ leases

    def add_lease(self, key: AdapterKey, now: float) -> None:
        self.leases[key] = self.leases.get(key, 0) + 1
        self.gpu.policy.on_access(key, now)
        self.host.policy.on_access(key, now)  # a slot hit refreshes host recency

    def drop_lease(self, key: AdapterKey) -> bool:
        """Returns True when that was the last lease of `key`."""
        self.leases[key] -= 1
        if self.leases[key]:
            return False
        del self.leases[key]
        return True

    # ------------------------------------------------------------------ draining a slot

    def drain(self, key: AdapterKey, now: float) -> None:
        """The copy in the slot, if any, takes no new leases."""
        slot = self.gpu.get(key)
        if slot is not None and slot.op is None and slot.state is CopyState.READY:
            slot.move(CopyState.DRAINING, now)

    def undrain(self, key: AdapterKey, now: float) -> None:
        slot = self.gpu.get(key)
        if slot is not None and slot.op is None and slot.state is CopyState.DRAINING:
            slot.move(CopyState.READY, now)

    def draining(self) -> list[AdapterKey]:
        """Keys that were set aside and are not moving yet."""
        return [c.key for c in self.gpu if c.state is CopyState.DRAINING and c.op is None]

    def drainable(self, now: float) -> Iterable[AdapterKey]:
        """Keys that could be set aside, in the policy's order."""
        return self.gpu.ranked(
            now,
            lambda c: c.state is CopyState.READY and not c.op and c.key not in self.pins.gpu,
        )

    # ------------------------------------------------------------------ making room

    def make_room(
        self, key: AdapterKey, nbytes: int, *, slot: bool, speculative: bool, now: float
    ) -> Room | None:
        """Choose the victims that let `key` in; None when it cannot be done now.  Pure.

        Args:
            nbytes: host bytes of the newcomer (ignored when it is in host memory already).
            slot: it needs a slot.
            speculative: nobody waits for it, so no slot is given up for host bytes alone.
        """
        idle = self.gpu.ranked(now, self._may_leave_slot)
        demote = self.gpu.room_for(0, idle) if slot else []
        if demote is None or key in self.host:
            return None if demote is None else Room(demote, [])
        needed = len(demote)
        while True:
            # A host victim never sits in a slot, unless it gives that slot up in the same move.
            leavers = self.host.ranked(now, self._may_leave_host(frozenset(demote)))
            drop = self.host.room_for(nbytes, leavers)
            if drop is not None:
                return Room([k for i, k in enumerate(demote) if i < needed or k in drop], drop)
            extra = None if speculative else next(idle, None)
            if extra is None:
                return None
            demote.append(extra)

    def _may_leave_slot(self, slot: Copy) -> bool:
        key = slot.key
        return not (slot.op or key in self.leases or key in self.pins.gpu or key in self.unloading)

    def _may_leave_host(self, demoted: frozenset[AdapterKey]) -> Callable[[Copy], bool]:
        def may_leave(held: Copy) -> bool:
            key = held.key
            in_slot = key in self.gpu and key not in demoted
            protected = key in self.leases or key in self.pins or key in self.unloading
            return not (held.op or in_slot or protected)

        return may_leave

    def too_large(self, key: AdapterKey, nbytes: int) -> UnsupportedAdapterError | None:
        """Why `key` can never be brought in, whoever leaves, if that is so."""
        budget = self.host.max_bytes
        if budget is None or key in self.host:
            return None
        pinned = sum(copy.nbytes for copy in self.host if copy.key in self.pins)
        if nbytes + pinned <= budget:
            return None
        beside = f" beside {pinned} bytes that are pinned" if pinned else ""
        return UnsupportedAdapterError(
            f"{key} needs {nbytes} bytes of host memory and the budget is {budget}{beside}: "
            "raise host_bytes",
            key=key,
            tier=Tier.HOST,
        )

    # ------------------------------------------------------------------ transitions

    def begin(self, move: Transition, nbytes: int, now: float) -> None:
        """Set aside what `move` touches, in both tiers."""
        key = move.load
        slots = [k for k in (*move.demote, *move.drop) if k in self.gpu]
        held = [k for k in move.drop if k in self.host]
        to_slot = key if move.to is Tier.GPU else None
        to_host = key if key is not None and key not in self.host else None
        self.gpu.begin(move.op, to_slot, 0, dict.fromkeys(slots), now)
        self.host.begin(move.op, to_host, nbytes, held, now)

    def commit(
        self, op: int, reason: RemovalReason, cost_s: float, now: float
    ) -> tuple[list[AdapterKey], list[AdapterKey]]:
        """The transition happened.  Returns the keys that left (slots, host memory)."""
        return self.gpu.commit(op, reason, cost_s, now), self.host.commit(op, reason, cost_s, now)

    def abort(
        self, op: int, gone: frozenset[AdapterKey], dropped: frozenset[AdapterKey], now: float
    ) -> None:
        """The transition failed, but for what is `gone` from slots and `dropped` from host."""
        self.gpu.abort(op, gone | dropped, now)
        self.host.abort(op, dropped, now)
