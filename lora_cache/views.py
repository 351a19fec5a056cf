"""What a cache shows of itself: numbers (`Stats`) and who is where (`Snapshot`).

Plain frozen records; `to_dict` of each is the documented form of every ``--json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgspec

from lora_cache.adapter import AdapterKey
from lora_cache.catalog import Catalog
from lora_cache.engines import Engine
from lora_cache.events import Events, Eviction, MemoryEvent
from lora_cache.level import Level
from lora_cache.planner import Counters, Planner
from lora_cache.policies import explain
from lora_cache.state import Copy, CopyState, Tier

_TIERS = (Tier.GPU, Tier.HOST)
_ORDER = {Tier.GPU: 0, Tier.HOST: 1, Tier.DISK: 2}


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the cache was attached (`Counters` says what each counts), and ratios.

    Attributes:
        requests: leases granted, of whatever kind of hit.
        evictions: copies that lost a place to another adapter, slots and host together.
        waited_s: seconds that granted leases waited, in all.
        load_s: seconds that the engine spent on transitions, in all.
    """

    requests: int
    slot_hits: int
    host_hits: int
    disk_hits: int
    evictions: int
    gpu_evictions: int
    host_evictions: int
    activations: int
    disk_loads: int
    unloads: int
    load_failures: int
    drains: int
    drift: int
    given_back: int
    given_back_bytes: int
    prefetches_refused: int
    pins_refused: int
    waited_s: float
    load_s: float

    @classmethod
    def of(cls, counters: Counters, *, waited_s: float, load_s: float) -> Stats:
        return cls(
            requests=counters.slot_hits + counters.host_hits + counters.disk_hits,
            evictions=counters.gpu_evictions + counters.host_evictions,
            waited_s=waited_s,
            load_s=load_s,
            **asdict(counters),
        )

    @property
    def slot_hit_ratio(self) -> float:
        """Share of leases whose adapter sat in a slot; 0 before the first lease."""
        return self.slot_hits / self.requests if self.requests else 0.0

    @property
    def host_hit_ratio(self) -> float:
        """Share of leases whose adapter had to come from host memory."""
        return self.host_hits / self.requests if self.requests else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``."""
        return {
            **asdict(self),
            "slot_hit_ratio": round(self.slot_hit_ratio, 4),
            "host_hit_ratio": round(self.host_hit_ratio, 4),
        }


# A struct, for there may be thousands: made in a seventh of a dataclass's time, and no work for
# Python's collector of cycles, which would stop everything.
class AdapterStatus(msgspec.Struct, frozen=True, gc=False):
    """One adapter that is resident, or waited for.

    Attributes:
        key: the immutable identity, as text.
        tier: the nearest tier to the GPU in which its copy is ready (``disk`` if in none).
        slot: slot index, or None.
        gpu, host: state of its copy in that tier, or None without one.
        since_s: seconds that it has been in its nearest tier, in its present state.
        leases: leases held now.
        waiting: callers that wait for it.
        pinned: the tier that it is pinned in, or None.
        nbytes: bytes charged in host memory.
        place: in the order in which copies leave its nearest tier, from 1; None while it cannot.
        reason: the policy's words for that place, or "".
    """

    key: str
    name: str
    tier: Tier
    slot: int | None
    gpu: CopyState | None
    host: CopyState | None
    since_s: float
    leases: int
    waiting: int
    pinned: Tier | None
    nbytes: int
    rank: int
    place: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """How scarce memory is, and what follows for the cache.

    Attributes:
        levels: by resource: ``"host"``, and the UUIDs of GPUs that have been under pressure; empty
            if nothing is watched.
        host_bytes_now: what host memory may hold now; None: what is configured.  Adapters that are
            leased, pinned or in a slot stay, even if they alone are more.
        speculates: what nobody waits for may be loaded.
        events: the last changes, newest first.
    """

    levels: Mapping[str, Level]
    host_bytes_now: int | None
    speculates: bool
    events: tuple[MemoryEvent, ...]

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``."""
        return {
            "levels": {name: level.label for name, level in self.levels.items()},
            "host_bytes_now": self.host_bytes_now,
            "speculates": self.speculates,
            "events": [event.to_dict() for event in self.events],
        }


def memory_of(planner: Planner, events: Events, levels: Mapping[str, Level]) -> MemoryStatus:
    """The part of a snapshot that is about memory."""
    now, speculates = planner.residency.host.target, planner.squeeze.speculates
    return MemoryStatus(dict(levels), now, speculates, events.of_memory)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Who is where, at one moment.

    Attributes:
        slots: how many slots the engine has for us; `host_entries` likewise for host memory.
        host_bytes: bytes charged in host memory; `host_bytes_max` is what is configured, or what
            the engine has room for, or None.
        memory: how scarce memory is, and what that makes of the budget.
        waiting: callers that wait for a slot, a load or their turn, over all adapters.
        adapters: slots first, by index; then host memory, then who only waits.
        at_s: when, on the cache's clock.
        evictions: the last ones, newest first.
    """

    engine: str
    policy: str
    host_policy: str
    slots: int
    host_entries: int
    host_bytes: int
    host_bytes_max: int | None
    registered: int
    waiting: int
    adapters: tuple[AdapterStatus, ...]
    at_s: float
    evictions: tuple[Eviction, ...]
    memory: MemoryStatus

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "adapters": msgspec.to_builtins(self.adapters),  # there may be thousands
            "evictions": [event.to_dict() for event in self.evictions],
            "memory": self.memory.to_dict(),
        }

    def why(self, key: AdapterKey | str) -> str:
        """Why an adapter is where it is: what keeps it there, or what took it away.

        Args:
            key: the key, its digest, or its name.
        """
        name = str(key)
        wanted = {key.digest} if isinstance(key, AdapterKey) else {name}
        row = next((row for row in self.adapters if wanted & {row.key, row.name}), None)
        text = [f"{name} {_whereabouts(row)}"]
        if row is None or row.tier is not Tier.GPU:
            for event in self.evictions:
                if wanted & {event.victim.digest, event.victim.name}:
                    text.append(f"{self.at_s - event.at_s:.3g} s ago {event}")
                    break
        return ". ".join(text)


def _whereabouts(row: AdapterStatus | None) -> str:
    if row is None:
        return "is not resident, and nobody waits for it"
    if row.tier is Tier.GPU:
        text = f"is in slot {row.slot}"
    else:
        text = "is in host memory" if row.tier is Tier.HOST else "is not resident"
    held = []
    if row.leases:
        held.append(f"leased {row.leases} times" if row.leases > 1 else "leased")
    if row.pinned:
        held.append(f"pinned in {row.pinned}")
    if row.waiting:
        held.append(f"waited for by {row.waiting}")
    if CopyState.LOADING in (row.gpu, row.host):
        held.append("being loaded")
    elif CopyState.DRAINING in (row.gpu, row.host):
        held.append("takes no new leases")
    if row.place is not None:
        held.append(f"number {row.place} to leave: {row.reason}")
    return ", ".join([text, *held])


def snapshot_of(
    planner: Planner,
    catalog: Catalog,
    engine: Engine,
    events: Events,
    memory: MemoryStatus,
    now: float,
) -> Snapshot:
    """Draw the picture that `AsyncLoraCache.snapshot` returns."""
    gpu, host = planner.residency.gpu, planner.residency.host
    slot_of = {key: index for index, key in engine.slots().items()}
    queue = planner.awaited()
    residency, order = planner.residency, planner.residency.order_of_leaving
    leases, pins = residency.leases, residency.pins
    places = {tier: {key: n for n, key in enumerate(order(tier, now), 1)} for tier in _TIERS}

    # The event loop stands still meanwhile, once a second: a row is to take microseconds.
    def status(key: AdapterKey, held: Copy | None) -> AdapterStatus:
        slot, known = gpu.get(key), catalog.get(key)
        nearest, ready, table = slot or held, Tier.DISK, None
        if slot and slot.state is CopyState.READY:
            ready, table = Tier.GPU, gpu
        elif held and held.state is CopyState.READY:
            ready, table = Tier.HOST, host
        return AdapterStatus(
            key=key.digest,
            name=key.name,
            tier=Tier.GPU if slot and slot.state is CopyState.DRAINING else ready,
            slot=slot_of.get(key) if slot else None,
            gpu=slot.state if slot else None,
            host=held.state if held else None,
            since_s=now - nearest.since if nearest else 0.0,
            leases=leases.get(key, 0),
            waiting=queue.get(key, 0) if queue else 0,
            pinned=pins.tier_of(key),
            nbytes=held.nbytes if held else 0,
            rank=known.manifest.rank if known else 0,
            place=places[ready].get(key) if table is not None else None,
            reason=explain(table.policy, key, now) if table is not None else "",
        )

    rows = [status(copy.key, copy) for copy in host]
    rows += [status(key, None) for key in queue if key not in host]
    rows.sort(key=lambda row: (_ORDER[row.tier], row.slot or 0, row.name, row.key))
    return Snapshot(
        engine=engine.capabilities.name,
        policy=type(gpu.policy).__name__.lower(),
        host_policy=type(host.policy).__name__.lower(),
        slots=gpu.max_entries,
        host_entries=host.max_entries,
        host_bytes=host.used_bytes,
        host_bytes_max=host.max_bytes,
        registered=len(catalog),
        waiting=sum(queue.values()),
        adapters=tuple(rows),
        at_s=now,
        evictions=events.recent,
        memory=memory,
    )
