"""What is GDSF's own: worth per byte, over a clock that victims set."""

from __future__ import annotations

from lora_cache.policies import GDSF
from tests.policies.notify import evict, load, prefetch, ranking, unload, use


def test_large_cheap_and_rarely_used_goes_first() -> None:
    policy = GDSF()
    load(policy, 1, nbytes=4, cost_s=4.0)
    load(policy, 2, nbytes=8, cost_s=4.0)
    load(policy, 3, nbytes=4, cost_s=8.0)
    assert ranking(policy) == [2, 1, 3]
    use(policy, 2, 2)  # 3 · 4 / 8
    assert ranking(policy) == [1, 2, 3]


def test_the_use_that_it_was_loaded_for_counts_once() -> None:
    policy = GDSF()
    prefetch(policy, 1)
    load(policy, 2)
    use(policy, 1)
    assert ranking(policy) == [2, 1]  # equal: least recently used first
    use(policy, 1)
    load(policy, 3, cost_s=1.5)
    assert ranking(policy) == [2, 3, 1]


def test_the_clock_ages_what_is_not_used_any_more() -> None:
    policy = GDSF()
    load(policy, 1)
    use(policy, 1, 1)  # worth 3
    for number in range(2, 5):
        load(policy, number)
        assert ranking(policy) == ([number, 1] if number < 4 else [1, number])
        evict(policy, ranking(policy)[0])
    assert ranking(policy) == [4]


def test_the_clock_never_goes_back() -> None:
    """The planner may skip the cheapest one and take it later."""
    policy = GDSF()
    load(policy, 1)
    load(policy, 2, cost_s=5.0)
    evict(policy, 2)  # the clock is 5
    load(policy, 3)
    evict(policy, 1)  # worth 1
    load(policy, 4)
    assert ranking(policy) == [3, 4]  # both worth 6


def test_an_unload_does_not_move_the_clock() -> None:
    policy = GDSF()
    load(policy, 1, cost_s=5.0)
    load(policy, 2, cost_s=1.5)
    unload(policy, 1)
    load(policy, 3)
    assert ranking(policy) == [3, 2]


def test_slots_charge_no_bytes() -> None:
    policy = GDSF()
    load(policy, 1, nbytes=0, cost_s=2.0)
    load(policy, 2, nbytes=0, cost_s=1.0)
    assert ranking(policy) == [2, 1]
