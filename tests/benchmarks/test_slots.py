"""The model of waiting for slots."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import bench_slots

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
