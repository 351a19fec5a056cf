"""The model of waiting for slots."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import bench_slots
from lora_cache.config import CacheConfig

SERVING, PROMISE = bench_slots.WORKLOADS["serving"], bench_slots.WORKLOADS["promise"]


def test_who_finds_all_slots_in_use_waits() -> None:
    few, many = (
        asyncio.run(bench_slots.serve(SERVING, 16, 8, 0, slots, policy="lru")) for slots in (8, 200)
    )
    assert few["all_slots_busy"] > 0.5
    assert many["all_slots_busy"] == 0
    assert few["ttft_p99_ms"] > 5 * many["ttft_p99_ms"]
    # Nobody waits: a load, the rest of the step under way and the own one, with some neighbours.
    assert 25 < many["ttft_p50_ms"] < 90


@pytest.mark.parametrize("workload", [SERVING, PROMISE])
def test_the_model_is_exact(workload: bench_slots.Workload) -> None:
    once, again = (asyncio.run(bench_slots.serve(workload, 16, 3, 1, 16)) for _ in range(2))
    assert once == again


@pytest.mark.long
def test_longer_answers_need_more_slots() -> None:
    few, many = (asyncio.run(bench_slots.serve(PROMISE, 4, 20, 1, slots)) for slots in (8, 32))
    assert few["all_slots_busy"] > 0.3
    assert few["ttft_p99_ms"] > 3000 > 1000 > many["ttft_p99_ms"]


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_to_set_victims_aside_at_once_makes_more_wait_and_serves_none_sooner(seed: int) -> None:
    """Why `drain_after_s` is what it is by default."""
    hasty, default = (
        asyncio.run(bench_slots.serve(PROMISE, 6.0, 60.0, seed, 16, drain_after_s=patience))
        for patience in (1.0, CacheConfig().drain_after_s)
    )
    assert default["ttft_p50_ms"] < 0.8 * hasty["ttft_p50_ms"]
    assert default["ttft_p99_ms"] < hasty["ttft_p99_ms"]
    assert default["requests_per_s"] > hasty["requests_per_s"]


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_slow_reads_take_no_slots(seed: int) -> None:
    """Three reads a second, of 0.4 s each, would keep one or two of eight slots from others."""
    quick, slow = (
        asyncio.run(bench_slots.serve(SERVING, 8, 60, seed, 8, (32, read_s)))
        for read_s in (0.0, 0.4)
    )
    assert 0.3 < slow["from_disk"] < 0.5
    assert slow["ttft_p50_ms"] < quick["ttft_p50_ms"] + 150
    assert slow["ttft_p99_ms"] < quick["ttft_p99_ms"] + 400
