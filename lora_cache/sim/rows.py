"""What a simulation reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one trace under one policy.

    Attributes:
        host_entries, host_bytes: size of host memory, or None for no limit.
        hold: how long leases were held, as on the command line.
        adapters: how many different ones the trace asks for.
        slot_hits, host_hits, disk_hits: requests, by where they found their adapter; one that
            joins a load under way counts as that load does.
        gpu_misses: requests that did not find it in a slot.
        host_misses: requests that found it neither in a slot nor in host memory.
        evictions: copies that lost a place to another adapter, slots and host memory together.
        drains: victims that took no new leases because somebody had waited too long.
        disk_to_host_bytes, host_to_slot_bytes: moved on each hop.
        wait_s: seconds that requests waited, in all; without leases held: that the loads take.
        wait_p50_s, wait_p99_s: of one request, right to 1 %; None without leases held.
        miss_ratio: `gpu_misses` per request.
        belady_gpu_misses: those of Belady's policy; None if it was not replayed.
        belady_closed: how much of the distance from LRU's misses to Belady's this policy saves:
            0 is LRU, 1 is Belady; None if either is not known, or they are the same.
    """

    trace: str
    policy: str
    gpu_slots: int
    host_entries: int | None
    host_bytes: int | None
    hold: str
    requests: int
    adapters: int
    slot_hits: int
    host_hits: int
    disk_hits: int
    gpu_misses: int
    host_misses: int
    evictions: int
    gpu_evictions: int
    host_evictions: int
    drains: int
    disk_to_host_bytes: int
    host_to_slot_bytes: int
    wait_s: float
    wait_p50_s: float | None
    wait_p99_s: float | None
    miss_ratio: float
    belady_gpu_misses: int | None
    belady_closed: float | None

    def to_dict(self) -> dict[str, Any]:
        """The documented form of ``simulate --json``."""
        return asdict(self)
