"""Leases that are held: who waits how long, against times worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cache.errors import ConfigError
from lora_cache.sim import Hold, Request, Row, Setup, TransferCost, open_trace, parse_hold, simulate
from tests.sim.traces import ListTrace

SLOW = TransferCost(1.0, math.inf, 0.5, math.inf)  # 1.5 s from disk, 0.5 s from host memory
FREE = TransferCost(0.0, math.inf, 0.0, math.inf)


def play(text: str, slots: int = 1, hold: str = "2.0", **options: object) -> Row:
    """Replay requests written like ``0A 1B 4A``: time in seconds, adapter."""
    requests = [Request(float(word[:-1]), word[-1], 1, 100) for word in text.split()]
    setup = Setup(hold=parse_hold(hold), **{"cost": SLOW, **options})  # type: ignore[arg-type]
    (row,) = simulate(ListTrace(requests), ["lru"], [slots], setup)
    return row


def test_who_waits_for_loads_and_slots() -> None:
    # A: loaded at 1.5, held until 3.5.  B: begun then, loaded at 5, held until 7.  A again: begun
    # at 7, from host memory, ready at 7.5, held until 9.5, and still there at 10.
    row = play("0A 1B 4A 10A")
    assert (row.slot_hits, row.host_hits, row.disk_hits) == (1, 1, 2)
    assert row.wait_s == pytest.approx(1.5 + 4.0 + 3.5 + 0.0)
    assert row.gpu_evictions == 2
    assert row.hold == "2.0"


def test_a_hold_by_output_tokens() -> None:
    assert play("0A 1B 4A 10A", hold="0.02/token").wait_s == pytest.approx(9.0)
    assert play("0A 1B 4A 10A", hold="0.02/token").hold == "0.02/token"


def test_who_joins_a_load_waits_for_the_rest_of_it() -> None:
    row = play("0A 0.5A 1.5A")
    assert (row.slot_hits, row.host_hits, row.disk_hits) == (1, 0, 2)
    assert row.wait_s == pytest.approx(1.5 + 1.0)


def test_loads_one_at_a_time_or_together() -> None:
    assert play("0A 0B", slots=2).wait_s == pytest.approx(1.5 + 3.0)
    assert play("0A 0B", slots=2, max_in_flight=None).wait_s == pytest.approx(1.5 + 1.5)


def test_the_planners_deadlines_are_kept() -> None:
    # B waits from 0.5; A's second request overtakes it; from 1.5 on A's slot takes no more, so the
    # third one waits until B, served at 3, has had its turn until 5.
    row = play("0A 0.5B 1A 1.8A", cost=FREE, drain_after_s=1.0)
    assert row.wait_s == pytest.approx(2.5 + 3.2)
    assert row.drains == 2
    # Without a deadline the third one overtakes as well, and B is served when that ends, at 3.8.
    row = play("0A 0.5B 1A 1.8A", cost=FREE, drain_after_s=100.0)
    assert row.wait_s == pytest.approx(3.3)
    assert row.drains == 0


def test_quantiles_of_waiting() -> None:
    text = " ".join(f"{10 * number}A" for number in range(98)) + " 980B 990A"
    row = play(text)
    assert row.wait_p50_s == 0
    assert row.wait_p99_s == pytest.approx(1.5, rel=0.011)
    row = play("0A 10B 20A 30B")
    assert row.wait_p50_s == pytest.approx(0.5, rel=0.011)


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.integers(0, 7), min_size=1, max_size=80),
    slots=st.integers(1, 4),
    spare=st.none() | st.integers(0, 3),
    policy=st.sampled_from(["lru", "lfu", "belady"]),
)
def test_what_takes_no_time_is_as_if_it_were_not_held(
    asked: list[int], slots: int, spare: int | None, policy: str
) -> None:
    trace = ListTrace(Request(float(t), f"a{n}", 1, 1) for t, n in enumerate(asked))
    host = None if spare is None else slots + spare
    held, instant = (
        simulate(trace, [policy], [slots], Setup(host_entries=host, hold=hold, cost=FREE))[0]
        for hold in (Hold(0.0), None)
    )
    different = {"hold", "wait_p50_s", "wait_p99_s"}
    assert {k: v for k, v in held.to_dict().items() if k not in different} == {
        k: v for k, v in instant.to_dict().items() if k not in different
    }


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 2), min_size=1, max_size=60),
    slots=st.integers(1, 3),
    hold=st.sampled_from(["0", "1.0", "0.05/token"]),
    host=st.none() | st.integers(3, 5),
    serial=st.booleans(),
)
def test_everybody_is_served_once(
    gaps: list[float], slots: int, hold: str, host: int | None, serial: bool
) -> None:
    times = [sum(gaps[: number + 1]) for number in range(len(gaps))]
    trace = ListTrace(
        Request(time_s, f"a{number * number % 7}", 1, 20) for number, time_s in enumerate(times)
    )
    setup = Setup(
        hold=parse_hold(hold), host_entries=host, cost=SLOW, max_in_flight=1 if serial else None
    )
    (row,) = simulate(trace, ["lru"], [slots], setup)
    assert row.slot_hits + row.host_hits + row.disk_hits == row.requests == len(gaps)
    assert row.wait_s >= 0
    if host is None:
        assert row.disk_to_host_bytes == row.adapters * setup.nbytes


def test_more_slots_wait_less() -> None:
    trace = open_trace("zipf:adapters=100,requests=3000,rate=4")
    rows = simulate(trace, ["lru"], [4, 16, 64], Setup(hold=Hold(per_token_s=0.01)))
    waits = [row.wait_s for row in rows]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > 2 * waits[-1]


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "nan", "inf", "1/", "1/second", "/token", "1/token/"]
)
def test_wrong_holds(text: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.02/token"):
        parse_hold(text)


def test_holds_as_they_are_written() -> None:
    assert parse_hold("none") is None
    for text, seconds in (("2.5", 2.5), ("0.02/token", 2.0)):
        hold = parse_hold(text)
        assert hold is not None
        assert str(hold) == text
        assert hold.seconds(100) == pytest.approx(seconds)
