"""Quantiles of a stream are right to one per cent, in a memory that does not grow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.sim.quantiles import Quantiles


@given(
    times=st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1),
    share=st.floats(0.01, 1.0),
)
def test_right_to_one_per_cent(times: list[float], share: float) -> None:
    quantiles = Quantiles()
    for time_s in times:
        quantiles.add(time_s)
    exact = sorted(times)[math.ceil(share * len(times)) - 1]
    assert quantiles.quantile(share) == pytest.approx(exact, rel=0.0101)


def test_few_buckets() -> None:
    quantiles = Quantiles()
    for number in range(100_000):
        quantiles.add(1e-3 * 1.0001**number)
    assert len(quantiles._buckets) < 600


def test_of_nothing() -> None:
    assert Quantiles().quantile(0.5) == 0.0
