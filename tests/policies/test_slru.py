"""What is SLRU's own: two segments, and a size that it has to find out."""

from __future__ import annotations

import pytest

from lora_cache.errors import ConfigError
from lora_cache.policies import SLRU
from tests.policies.notify import evict, load, prefetch, ranking, unload, use


def test_what_was_used_again_stays_behind_what_was_not() -> None:
    policy = SLRU()
    load(policy, 1, 2, 3)
    use(policy, 1)
    assert ranking(policy) == [2, 3, 1]


def test_the_use_that_it_was_loaded_for_does_not_protect() -> None:
    policy = SLRU()
    prefetch(policy, 1, 2)
    use(policy, 1)  # whenever it comes, the first use of a prefetched copy is just recent
    assert ranking(policy) == [2, 1]
    load(policy, 3)
    assert ranking(policy) == [2, 1, 3]
    use(policy, 1)
    assert ranking(policy) == [2, 3, 1]


def test_four_fifths_of_what_was_resident_are_protected_once_somebody_left() -> None:
    policy = SLRU()
    load(policy, 1, 2, 3, 4, 5, 6)
    use(policy, 1, 2, 3, 4, 5)
    assert ranking(policy) == [6, 1, 2, 3, 4, 5]
    evict(policy, 6)  # six fit; four of them, int(4.8), may be protected: 1 is on probation again
    load(policy, 7)
    use(policy, 1)  # which protects it anew, and 2 goes in its stead
    assert ranking(policy) == [7, 2, 3, 4, 5, 1]
    use(policy, 7)
    assert ranking(policy) == [2, 3, 4, 5, 1, 7]


def test_an_unload_does_not_make_the_tier_smaller() -> None:
    policy = SLRU()
    load(policy, 1, 2, 3, 4, 5, 6)
    use(policy, 1, 2, 3, 4, 5)
    unload(policy, 6)  # there is room, so nobody goes back on probation
    load(policy, 7)
    assert ranking(policy) == [7, 1, 2, 3, 4, 5]


def test_a_single_slot_has_no_room_for_protection() -> None:
    policy = SLRU()
    load(policy, 1)
    use(policy, 1)
    evict(policy, 1)
    load(policy, 2)
    use(policy, 2)
    assert ranking(policy) == [2]


def test_what_comes_back_starts_on_probation() -> None:
    policy = SLRU()
    load(policy, 1, 2)
    use(policy, 1)
    unload(policy, 1)
    load(policy, 1)
    assert ranking(policy) == [2, 1]


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_share_must_be_one(share: float) -> None:
    with pytest.raises(ConfigError, match="protected_share"):
        SLRU(share)


def test_share_is_a_setting() -> None:
    policy = SLRU(protected_share=0.5)
    load(policy, 1, 2, 3, 4)
    use(policy, 1, 2, 3)
    evict(policy, 4)
    assert ranking(policy) == [1, 2, 3]
    use(policy, 1)
    assert ranking(policy) == [2, 3, 1]
