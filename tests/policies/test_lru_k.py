"""What is LRU-2's own: the last use but one, also of what has left and come back."""

from __future__ import annotations

import pytest

from lora_cache.errors import ConfigError
from lora_cache.policies import LRUK
from tests.policies.notify import evict, load, prefetch, ranking, unload, use


def test_ranks_by_the_last_use_but_one() -> None:
    policy = LRUK()
    load(policy, 1, 2, 3)
    use(policy, 2, 1, 2)
    assert ranking(policy) == [3, 1, 2]  # 3 has none, 1's is older than 2's
    use(policy, 3)
    assert ranking(policy) == [1, 3, 2]


def test_what_was_used_once_goes_by_that_use() -> None:
    policy = LRUK()
    prefetch(policy, 1, 2)
    use(policy, 1)
    load(policy, 3)
    assert ranking(policy) == [2, 1, 3]


def test_what_comes_back_is_known() -> None:
    policy = LRUK()
    load(policy, 1, 2, 3)
    evict(policy, 1)
    load(policy, 1)
    assert ranking(policy) == [2, 3, 1]
    use(policy, 2, 3)  # their use but one is younger than that of 1
    assert ranking(policy) == [1, 2, 3]


def test_a_copy_that_was_never_used_leaves_no_trace() -> None:
    policy = LRUK()
    prefetch(policy, 1)
    unload(policy, 1)
    load(policy, 1, 2)
    assert ranking(policy) == [1, 2]
    evict(policy, 1)  # used once
    prefetch(policy, 1)
    evict(policy, 1)  # not used this time: what is known is the use before
    load(policy, 3, 1)
    assert ranking(policy) == [2, 3, 1]
    use(policy, 2, 3)
    assert ranking(policy) == [1, 2, 3]


def test_history_is_bounded() -> None:
    policy = LRUK(history=2)
    load(policy, 1, 2, 3)
    evict(policy, 1, 2, 3)
    load(policy, 3, 2, 1)  # 1 has been forgotten
    assert ranking(policy) == [1, 2, 3]
    forgetful = LRUK(history=0)
    load(forgetful, 1, 2)
    evict(forgetful, 1)
    load(forgetful, 1)
    assert ranking(forgetful) == [2, 1]
    use(forgetful, 2)
    assert ranking(forgetful) == [1, 2]


def test_what_was_never_used_takes_no_place_in_history() -> None:
    policy = LRUK(history=1)
    load(policy, 1)
    evict(policy, 1)
    prefetch(policy, 9)
    unload(policy, 9)
    load(policy, 1, 2)
    assert ranking(policy) == [2, 1]


def test_history_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match="history"):
        LRUK(history=-1)
