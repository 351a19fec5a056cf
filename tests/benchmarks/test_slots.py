"""The model of waiting for slots."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import bench_slots


def test_who_finds_all_slots_in_use_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_slots, "SECONDS", 8.0)
    few, many = (asyncio.run(bench_slots.serve(16, 0, slots, "lru")) for slots in (8, 200))
    assert few["all_slots_busy"] > 0.5
    assert many["all_slots_busy"] == 0
    assert few["ttft_p99_ms"] > 5 * many["ttft_p99_ms"]
    # Nobody waits: a load, the rest of the step under way and the own one, with some neighbours.
    assert 25 < many["ttft_p50_ms"] < 90


def test_the_model_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_slots, "SECONDS", 3.0)
    once, again = (asyncio.run(bench_slots.serve(16, 1, 16, "auto")) for _ in range(2))
    assert once == again
