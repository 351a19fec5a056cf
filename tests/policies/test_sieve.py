"""What is SIEVE's own: the hand moves when a victim has left, and only then."""

from __future__ import annotations

from lora_cache.policies import Sieve
from tests.policies.notify import evict, load, prefetch, ranking, unload, use


def test_spares_what_was_used_again_once() -> None:
    policy = Sieve()
    load(policy, 1, 2, 3)
    use(policy, 1)
    assert ranking(policy) == [2, 3, 1]
    evict(policy, 2)  # the hand has passed 1 and stands at 3
    load(policy, 4)
    assert ranking(policy) == [3, 4, 1]
    evict(policy, 3)
    evict(policy, 4)  # round: 1 is not spared again
    load(policy, 5)
    assert ranking(policy) == [1, 5]


def test_newcomers_come_in_behind_all_not_behind_the_hand() -> None:
    """That is what sets it apart from CLOCK."""
    policy = Sieve()
    load(policy, 1, 2, 3)
    use(policy, 1)
    evict(policy, 2)
    load(policy, 4)  # CLOCK would put it where 2 was, the last one to be looked at
    assert ranking(policy) == [3, 4, 1]


def test_the_use_that_it_was_loaded_for_does_not_spare_it() -> None:
    policy = Sieve()
    prefetch(policy, 1)
    load(policy, 2)
    use(policy, 1)
    assert ranking(policy) == [1, 2]
    use(policy, 1)
    assert ranking(policy) == [2, 1]


def test_when_all_were_used_the_oldest_goes_after_a_whole_round() -> None:
    policy = Sieve()
    load(policy, 1, 2, 3)
    use(policy, 3, 2, 1)
    assert ranking(policy) == [1, 2, 3]
    evict(policy, 1)
    use(policy, 2)  # all bits are cleared, so this one counts anew
    assert ranking(policy) == [3, 2]


def test_passes_over_what_the_planner_would_not_take() -> None:
    policy = Sieve()
    load(policy, 1, 2, 3, 4)
    evict(policy, 3)  # 1 and 2 were leased; the hand stands at 4
    load(policy, 5)
    assert ranking(policy) == [4, 5, 1, 2]


def test_a_victim_that_leaves_late_does_not_send_the_hand_round() -> None:
    """1 and 2 were chosen together; 2 was gone first.  What is ahead keeps that it was used."""
    policy = Sieve()
    load(policy, 1, 2, 3, 4)
    use(policy, 3, 4)
    evict(policy, 2)
    evict(policy, 1)
    load(policy, 5)
    assert ranking(policy) == [5, 3, 4]


def test_what_comes_back_starts_anew() -> None:
    policy = Sieve()
    load(policy, 1, 2)
    use(policy, 1)
    unload(policy, 1)
    load(policy, 1, 3)
    assert ranking(policy) == [2, 1, 3]


def test_an_unload_leaves_the_hand_where_it_is() -> None:
    policy = Sieve()
    load(policy, 1, 2, 3, 4, 5)
    use(policy, 1)
    evict(policy, 2)
    unload(policy, 4)
    assert ranking(policy) == [3, 5, 1]
    unload(policy, 3)
    unload(policy, 5)  # nothing is ahead of the hand any more
    load(policy, 6)
    assert ranking(policy) == [1, 6]
