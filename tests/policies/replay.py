"""A trace through the real planner, one request at a time: who was missed, and who had to leave."""

from __future__ import annotations

import csv
import gzip
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_cache.planner import Limits, Planner, Start
from lora_cache.policies import LRU, Policy
from lora_cache.state import Tier
from tests.planner.driver import key_of

TRACES = Path(
    os.environ.get("LORA_CACHE_TRACES", Path(__file__).parents[2].parent / "shared" / "traces")
)


@dataclass(frozen=True)
class Replay:
    """What happened, by adapter number: loads into the tier, and victims."""

    misses: int
    victims: list[int]


#: Where loads take no time, those from disk need not come in two steps.
_AT_ONCE = {"stages_without_slot": False}


def replay(
    trace: Sequence[int],
    policy: Callable[[], Policy],
    slots: int,
    cost_s: Callable[[int], float] = lambda number: 1.0,
) -> Replay:
    """Lease and release each adapter of `trace`; `policy` decides who has a slot."""
    planner = Planner(Limits(slots, 1_000_000, **_AT_ONCE), policy(), LRU())
    return _run(planner, trace, Tier.GPU, lambda number: 1, cost_s)


def replay_bytes(
    trace: Sequence[int],
    policy: Callable[[], Policy],
    budget: int,
    nbytes: Callable[[int], int],
    cost_s: Callable[[int], float] = lambda number: 1.0,
) -> Replay:
    """The same for host memory.  There is one slot, so it never keeps a second one from leaving."""
    limits = Limits(1, 1_000_000, host_bytes=budget, **_AT_ONCE)
    return _run(Planner(limits, LRU(), policy()), trace, Tier.HOST, nbytes, cost_s)


def _run(
    planner: Planner,
    trace: Sequence[int],
    tier: Tier,
    nbytes: Callable[[int], int],
    cost_s: Callable[[int], float],
) -> Replay:
    keys = {number: key_of(number) for number in set(trace)}
    numbers = {key: number for number, key in keys.items()}
    victims: list[int] = []
    for ticket, number in enumerate(trace):
        now = float(ticket)
        for action in planner.acquire(ticket, keys[number], nbytes(number), now):
            if isinstance(action, Start):
                move = action.transition
                gone = move.demote if tier is Tier.GPU else move.drop
                victims += [numbers[key] for key in gone]
                planner.completed(move.op, cost_s(number), now)
        planner.release(ticket, now)
    planner.check()
    counters = planner.counters
    loads = counters.activations if tier is Tier.GPU else counters.disk_loads
    return Replay(loads, victims)


def zipf_trace(seed: int, length: int = 1500, adapters: int = 60, skew: float = 0.9) -> list[int]:
    """Popularity by rank; halfway through everything moves by a third, so that age matters."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) ** skew for rank in range(adapters)]
    ranks = rng.choices(range(adapters), weights, k=length)
    late = adapters // 3
    return [(rank + late * (2 * i >= length)) % adapters for i, rank in enumerate(ranks)]


def recorded_trace(name: str, length: int | None = None) -> list[int]:
    """The adapters of a recorded trace, numbered as they appear; skips where there is none."""
    path = TRACES / f"{name}.csv.gz"
    if not path.exists():
        pytest.skip(f"no {path.name} in {TRACES}: set LORA_CACHE_TRACES to where it is")
    numbers: dict[str, int] = {}
    trace = []
    with gzip.open(path, "rt") as lines:
        for row in csv.DictReader(lines):
            trace.append(numbers.setdefault(row["adapter"], len(numbers)))
            if len(trace) == length:
                break
    return trace
