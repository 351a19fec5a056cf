"""Leases that end at once: what is counted, against counts made by hand."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cache.errors import ConfigError, LoraCacheError
from lora_cache.key import AdapterKey
from lora_cache.policies import LRU, RemovalReason
from lora_cache.sim import TYPICAL_NBYTES, Request, Setup, TransferCost, open_trace, simulate
from tests.sim.traces import ListTrace, asking

ARRIVALS = Path(__file__).parents[2] / "benchmarks/results/arrivals_h100.json"
COST = TransferCost(disk_fixed_s=2.0, disk_bytes_per_s=100.0, slot_fixed_s=0.5, slot_bytes_per_s=10)


def test_every_count_of_a_small_trace() -> None:
    trace = asking("ABACBDA")  # two slots, three places in host memory, LRU
    (row,) = simulate(trace, ["lru"], [2], Setup(host_entries=3, nbytes=10, cost=COST))
    # A and B come from disk; A is a slot hit; C from disk (B leaves its slot); B from host memory
    # (A leaves its slot); D from disk (A leaves memory, C its slot); A from disk (C leaves memory,
    # B its slot).
    assert (row.requests, row.adapters) == (7, 4)
    assert (row.slot_hits, row.host_hits, row.disk_hits) == (1, 1, 5)
    assert (row.gpu_misses, row.host_misses) == (6, 5)
    assert (row.gpu_evictions, row.host_evictions, row.evictions) == (4, 2, 6)
    assert (row.disk_to_host_bytes, row.host_to_slot_bytes) == (50, 60)
    assert row.wait_s == pytest.approx(5 * 2.1 + 6 * 1.5)
    assert (row.wait_p50_s, row.wait_p99_s, row.drains) == (None, None, 0)
    assert row.miss_ratio == round(6 / 7, 6)
    assert (row.trace, row.policy, row.gpu_slots, row.hold) == ("list", "lru", 2, "none")
    assert (row.host_entries, row.host_bytes) == (3, None)


def test_host_memory_without_limit_keeps_everything() -> None:
    (row,) = simulate(asking("ABCDABCDABCD"), ["lru"], [1])
    assert (row.slot_hits, row.host_hits, row.disk_hits) == (0, 8, 4)
    assert row.host_evictions == 0
    assert row.host_misses == 4


def test_sizes_come_from_the_trace_where_it_has_them() -> None:
    sizes = {"A": 30, "B": 30, "C": 60}
    requests = [Request(t, name, 1, 1, sizes[name]) for t, name in enumerate("ABC")]
    requests.append(Request(9.0, "D", 1, 1))
    trace = ListTrace(requests)
    (row,) = simulate(trace, ["lru"], [4], Setup(host_bytes=100, nbytes=5, cost=COST))
    assert row.disk_to_host_bytes == 30 + 30 + 60 + 5
    assert row.host_evictions == 1, "A alone makes room for C"
    assert row.wait_s == pytest.approx(4 * 2.5 + 125 / 100 + 125 / 10)


def test_where_belady_and_lru_are() -> None:
    trace = asking("ABCABCABCD" * 3)
    rows = simulate(trace, ["lru", "belady", "lfu:half_life_s=inf"], [2])
    lru, belady, lfu = rows
    assert lru.belady_closed == 0.0
    assert belady.belady_closed == 1.0
    assert {row.belady_gpu_misses for row in rows} == {belady.gpu_misses}
    share = (lru.gpu_misses - lfu.gpu_misses) / (lru.gpu_misses - belady.gpu_misses)
    assert lfu.belady_closed == pytest.approx(share, abs=1e-4)
    (alone,) = simulate(trace, ["lfu"], [2])
    assert alone.belady_gpu_misses == belady.gpu_misses
    assert alone.belady_closed is None, "without LRU there is no distance"
    (row,) = simulate(trace, ["lru"], [2], Setup(belady=False))
    assert (row.belady_gpu_misses, row.belady_closed) == (None, None)
    (row,) = simulate(trace, ["lru"], [4])
    assert row.belady_closed is None, "nothing is to be gained with a slot for each"


@pytest.mark.long
def test_rows_do_not_depend_on_what_else_is_replayed() -> None:
    trace = open_trace("zipf:adapters=60,requests=3000")
    together = simulate(trace, ["lru", "lfu", "belady"], [3, 8], Setup(host_entries=20))
    assert [(row.gpu_slots, row.policy) for row in together] == [
        (slots, policy) for slots in (3, 8) for policy in ("lru", "lfu", "belady")
    ]
    for row in together:
        alone = simulate(trace, ["lru", row.policy], [row.gpu_slots], Setup(host_entries=20))[1]
        assert alone == row


def test_every_policy_that_there_is_by_default() -> None:
    names = [row.policy for row in simulate(asking("ABC"))]
    assert {"lru", "lfu"} <= set(names)


class MostRecent:
    """A policy of one's own: the worst there is for a loop's beginning, the best for its end."""

    def __init__(self) -> None:
        self._order: OrderedDict[AdapterKey, None] = OrderedDict()

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        assert cost_s > 0
        self._order[key] = None

    def on_access(self, key: AdapterKey, now: float) -> None:
        self._order.move_to_end(key)

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        assert reason is RemovalReason.EVICTED
        del self._order[key]

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return reversed(self._order)


def test_a_policy_of_ones_own() -> None:
    loop = asking("ABC" * 20)
    mru, lru = simulate(loop, [MostRecent, "lru"], [2], Setup(host_entries=2))
    assert mru.policy == "MostRecent"
    assert lru.gpu_misses == 60
    assert mru.gpu_misses == mru.belady_gpu_misses == 31


class Unwilling(LRU):
    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter(())


def test_a_policy_that_names_no_victim_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(LoraCacheError, match="names no victim"):
        simulate(asking("AB"), [Unwilling], [1])
    from lora_cache.sim import Hold

    with pytest.raises(LoraCacheError, match="names no victim"):
        simulate(asking("AB"), [Unwilling], [1], Setup(hold=Hold(0.1)))


@pytest.mark.parametrize(
    ("policies", "slots", "setup", "message"),
    [
        (["mru"], [4], Setup(), "unknown policy 'mru': .*belady"),
        (["lru"], [0], Setup(), "at least one slot"),
        (["lru"], [4, 8], Setup(host_entries=6), "6 adapters is too small for 8 slots"),
        (["lru"], [1], Setup(host_bytes=99, nbytes=100), "adapter A has 100 bytes.* 99"),
        (["lfu:half_life_s=0"], [1], Setup(), "half_life_s must be positive"),
    ],
)
def test_refused(policies: list[str], slots: list[int], setup: Setup, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(asking("ABC"), policies, slots, setup)


def test_an_empty_trace_and_one_that_changes() -> None:
    with pytest.raises(ConfigError, match="list holds no requests"):
        simulate(ListTrace([]), ["lru"])

    class Shrinking(ListTrace):
        def __iter__(self) -> Iterator[Request]:
            self.held.pop()
            return super().__iter__()

    with pytest.raises(ConfigError, match="had 5 requests, now 4"):
        simulate(Shrinking(asking("ABCABC").held), ["lru"])


def test_progress_is_told_of_both_readings() -> None:
    told: list[tuple[int, int | None]] = []
    trace = open_trace("zipf:adapters=10,requests=3000")
    simulate(trace, ["lru"], [2], progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == [0, 1024, 2048, 1024, 2048, 3000]
    assert {total for _, total in told} == {3000}


class Endless(ListTrace):
    """Requests that nobody holds."""

    def __init__(self, length: int) -> None:
        super().__init__([])
        self.length = length

    def __iter__(self) -> Iterator[Request]:
        return (Request(float(t), f"a{t * t % 53}", 1, 1) for t in range(self.length))


@pytest.mark.long
def test_memory_does_not_grow_with_the_trace_but_for_belady() -> None:
    def peak(requests: int, setup: Setup) -> int:
        tracemalloc.start()
        simulate(Endless(requests), ["lru"], [8], setup)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    setup = Setup(belady=False, host_entries=20)
    peak(2000, setup)
    assert peak(12_000, setup) < peak(3000, setup) + 9000 * 2
    assert peak(12_000, Setup()) < peak(3000, Setup()) + 9000 * 6


def test_the_default_cost_is_what_was_measured() -> None:
    """205 ms for a cold adapter of 84 MB, 16.5 ms for one in host memory."""
    cost = TransferCost()
    slot_s = cost.host_to_slot_s(TYPICAL_NBYTES)
    assert slot_s == pytest.approx(0.0165)
    assert slot_s + cost.disk_to_host_s(TYPICAL_NBYTES) == pytest.approx(0.205)
    assert cost.host_to_slot_s(0) == pytest.approx(0.01488)
    assert cost.disk_to_host_s(2 * TYPICAL_NBYTES) == pytest.approx(0.377)
    resident = Setup.of_engine("resident")
    raw = json.loads(ARRIVALS.read_text())["rows"]
    ours = [row for row in raw if (row["server"], row["table"]) == ("resident", "idle")]
    took_s = {row["from"]: row["median_ms"] / 1e3 for row in ours}
    slot_s = resident.cost.host_to_slot_s(TYPICAL_NBYTES)
    assert slot_s == pytest.approx(took_s["host memory"], rel=0.02)
    cold_s = slot_s + resident.cost.disk_to_host_s(TYPICAL_NBYTES)
    assert cold_s == pytest.approx(took_s["disk"], rel=0.02)
    assert (resident.max_in_flight, Setup.of_engine("stock")) == (None, Setup())
    with pytest.raises(ConfigError, match="choose of stock, resident"):
        Setup.of_engine("fast")
    free = TransferCost(0, math.inf, 0, math.inf)
    assert free.disk_to_host_s(10**12) + free.host_to_slot_s(10**12) == 0
