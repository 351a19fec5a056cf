from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cache.bench.figures import quantile, spread, summary
from lora_cache.bench.streams import Answer, longest_gap, poisson, replay, zipf


@pytest.mark.parametrize(
    ("share", "expected"), [(0.01, 1), (0.5, 50), (0.505, 51), (0.99, 99), (1.0, 100)]
)
def test_a_quantile_is_the_smallest_number_that_enough_do_not_exceed(
    share: float, expected: float
) -> None:
    assert quantile(random.Random(0).sample(range(1, 101), 100), share) == expected


def test_no_numbers_have_no_quantile() -> None:
    assert math.isnan(quantile([], 0.5))


def test_a_summary_counts_from_when_a_request_was_due() -> None:
    answers = [
        Answer(0, 1.0, [1.1, 1.2, 1.4], done=True),
        Answer(1, 2.0, [2.3, 2.4], done=True),
    ]
    row = summary(answers, 2.0)
    assert (row["requests"], row["done"], row["adapters"]) == (2, 2, 2)
    assert (row["ttft_mean_ms"], row["ttft_p50_ms"], row["ttft_p99_ms"]) == (200, 100, 300)
    assert (row["gap_p50_ms"], row["gap_max_ms"]) == (100, 200)
    assert row["requests_per_s"] == 1.0


def test_a_first_token_that_never_came_is_in_the_quantiles() -> None:
    row = summary([Answer(0, 0.0, [0.1], done=True), Answer(0, 0.0)], 1.0)
    assert row["done"] == 1
    assert row["ttft_p50_ms"] == 100
    assert row["ttft_p99_ms"] is row["ttft_mean_ms"] is None


def test_a_spread_is_in_milliseconds() -> None:
    assert spread([0.001, 0.003, 0.002]) == {"median_ms": 2, "p90_ms": 3, "max_ms": 3}


def test_the_longest_gap_is_of_one_answer_and_reaches_into_the_time() -> None:
    running = [Answer(0, 0, [0.0, 5.0, 5.1, 5.4, 9.0]), Answer(0, 0, [5.0, 5.2])]
    assert longest_gap(running, 5.05, 5.3) == pytest.approx(0.3)
    assert longest_gap(running, 5.05, 6.0) == pytest.approx(3.6)
    assert longest_gap([], 0, 10) == 0


def test_arrivals_follow_rate_and_popularity() -> None:
    weights = zipf([2, 0, 1], 1.0)
    assert weights == [1 / 2, 1 / 3, 1]
    found = poisson(random.Random(0), 50, 100, weights)
    assert len(found) == pytest.approx(5000, rel=0.05)
    assert [at for at, _ in found] == sorted(at for at, _ in found)
    shares = [sum(a == adapter for _, a in found) / len(found) for adapter in range(3)]
    assert shares == pytest.approx([w / sum(weights) for w in weights], abs=0.03)


class FakeServer:
    """Answers at once, but never for adapter 1."""

    name = "fake"

    async def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]:
        for _ in range(params):
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])])
        if adapter == 1:
            await asyncio.sleep(60)


@pytest.mark.parametrize("arrivals", [[], [(0.0, 0), (0.02, 1), (0.04, 0)]])
def test_a_replay_gives_up_what_is_not_done_in_time(
    arrivals: list[tuple[float, int]],
) -> None:
    server: Any = FakeServer()
    number = len(arrivals)
    answers, seconds = asyncio.run(
        replay(server, arrivals, ["x"] * number, [2] * number, drain_s=0.1)
    )
    assert [answer.done for answer in answers] == [adapter != 1 for _, adapter in arrivals]
    assert all(len(answer.tokens) == 2 for answer in answers)
    assert 0 <= seconds < 5
