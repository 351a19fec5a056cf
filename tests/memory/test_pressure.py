"""Levels do not flap, do not lag when it matters, and more pressure is never less."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.errors import ConfigError
from lora_cache.memory import Level, Marks, Pressure

NONE, SOFT, HARD = Level


def levels(shares: Sequence[float | None], marks: Marks, step_s: float = 1.0) -> list[Level]:
    pressure, found = Pressure("host", marks), []
    for number, share in enumerate(shares):
        before = pressure.level
        event = pressure.update(share, number * step_s)
        assert (event is None) == (pressure.level is before)
        if event is not None:
            assert (event.before, event.after, event.share) == (before, pressure.level, share)
            assert (event.at_s, event.resource) == (number * step_s, "host")
        found.append(pressure.level)
    return found


def test_rises_at_once_and_falls_after_a_while_below_the_band() -> None:
    marks = Marks(soft=0.8, hard=0.9, band=0.1, dwell_s=2)
    shares = [0.5, 0.8, 0.75, 0.71, 0.69, 0.69, 0.69, 0.95, 0.85, 0.85, 0.85, 0.75, 0.75, 0.75, 0.0]
    expected = [NONE, SOFT, SOFT, SOFT, SOFT, SOFT, NONE, HARD, HARD, HARD, HARD, HARD, HARD, SOFT]
    assert levels(shares, marks) == [*expected, SOFT]
    assert levels([0.95, 0.1, 0.1, 0.1], marks) == [HARD, HARD, HARD, NONE], "both at once"


def test_what_is_not_known_changes_nothing() -> None:
    marks = Marks(soft=0.8, hard=0.9, band=0.1, dwell_s=2)
    assert levels([None, None], marks) == [NONE, NONE]
    shares = [0.85, 0.1, 0.1, None, 0.1, 0.1, 0.1]
    assert levels(shares, marks) == [SOFT] * 6 + [NONE], "the dwell time begins anew"


def test_an_event_in_words() -> None:
    event = Pressure("GPU-1", Marks(soft=0.8, hard=0.9, band=0.1)).update(0.95, 1.0)
    assert str(event) == "GPU-1: 95.0% of memory is in use, pressure was none, now hard"


@pytest.mark.parametrize(
    "wrong",
    [
        {"soft": 0.9, "hard": 0.9},
        {"soft": 0.95, "hard": 0.9},
        {"band": 0.0},
        {"band": 0.95},
        {"hard": 1.1},
        {"dwell_s": -1},
    ],
)
def test_marks_are_in_order(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="in order"):
        Marks(**wrong)


# ---------------------------------------------------------------------- properties

SHARES = st.floats(0, 1) | st.sampled_from([0.7, 0.8, 0.9])


@st.composite
def marks(draw: Any) -> Marks:
    soft = draw(st.floats(0.3, 0.8))
    hard = draw(st.floats(soft + 0.01, 1.0))
    band = draw(st.floats(0.01, soft))
    return Marks(soft, hard, band, draw(st.integers(0, 5)))


@given(marks(), st.lists(SHARES | st.none(), max_size=60))
def test_a_level_ends_only_after_the_whole_band_and_the_dwell_time(
    marks: Marks, shares: list[float | None]
) -> None:
    found = [NONE, *levels(shares, marks)]
    for level, mark in ((SOFT, marks.soft), (HARD, marks.hard)):
        held = [at >= level for at in found]
        for now, (before, after) in enumerate(pairwise(held)):
            share = shares[now]
            if after and not before:
                assert share is not None
                assert share >= mark, "it begins at its mark"
            elif before and not after:
                quiet = shares[max(0, now - int(marks.dwell_s)) : now + 1]
                assert all(s is not None and s < mark - marks.band for s in quiet)
                assert len(quiet) > marks.dwell_s, "it has lasted at least that long"
            elif not before:
                assert share is None or share < mark, "it never lags"


@given(marks(), st.data())
def test_a_signal_that_jitters_within_the_band_changes_a_level_once(
    marks: Marks, data: st.DataObject
) -> None:
    mark = data.draw(st.sampled_from([marks.soft, marks.hard]))
    near = st.floats(mark - marks.band, min(1.0, mark + 1e-9))
    found = [
        lv >= (SOFT if mark == marks.soft else HARD)
        for lv in levels(data.draw(st.lists(near, min_size=1, max_size=60)), marks)
    ]
    changes = sum(a != b for a, b in zip([False, *found], found, strict=False))
    assert changes <= 1


@given(marks(), st.lists(st.tuples(SHARES, SHARES) | st.none(), max_size=60))
def test_more_pressure_is_never_a_lower_level(
    marks: Marks, pairs: list[tuple[float, float] | None]
) -> None:
    low = levels([min(pair) if pair else None for pair in pairs], marks)
    high = levels([max(pair) if pair else None for pair in pairs], marks)
    assert all(a <= b for a, b in zip(low, high, strict=True))
