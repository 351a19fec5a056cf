"""What must be true of a planner between any two events (the numbers are those of the design).

1. A leased adapter keeps its slot; a pinned one keeps its tier.
2. Leased and GPU-pinned adapters never outnumber the slots, and one slot is never pinned.
7. No tier exceeds its budget.
9. Every granted lease is counted until it is released, and no longer.

Checked by tests after every event, not in production: it costs time in proportion to the state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from lora_cache.key import AdapterKey
from lora_cache.planner.actions import Transition
from lora_cache.planner.residency import Residency
from lora_cache.planner.waiting import WaitingLine


def check_invariants(
    residency: Residency,
    waiting: WaitingLine,
    *,
    held: Mapping[int, AdapterKey],
    moves: Iterable[Transition],
) -> None:
    """Raise AssertionError, naming the invariant, if one is broken.

    Args:
        held: key by ticket of every granted lease.
        moves: transitions in flight.
    """
    gpu, host, pins = residency.gpu, residency.host, residency.pins
    gpu.check()
    host.check()
    moves = list(moves)
    in_use = residency.leases.keys() | pins.gpu
    assert len(in_use) <= gpu.max_entries, "2: more in use than slots"
    assert len(pins.gpu) <= max(0, gpu.max_entries - 1), "2: the last slot is pinned"

    # What the engine lost is not where it must be until it has been brought back.
    lost = {demand.key for demand in waiting if demand.repair} | {move.load for move in moves}
    assert all(key in gpu for key in in_use - lost), "1: a leased adapter has no slot"
    assert all(key in host for key in pins.host - lost), "1: a pinned adapter left its tier"
    assert all(slot.key in host for slot in gpu), "slots are a part of host memory"
    for move in moves:
        assert not in_use & set(move.demote), "1: a victim is in use"
        assert not (in_use | pins.host) & set(move.drop), "1: a victim is in use or pinned"

    assert Counter(held.values()) == Counter(residency.leases), "9: a lease leaked"
    for demand in waiting:
        assert demand.repair or demand.tickets, "an empty demand"
        assert not gpu.is_ready(demand.key), "a waiter was forgotten"
    assert {number for demand in waiting for number in demand.tickets} == set(waiting.tickets)
