"""Belady's policy is optimal, through the planner that serves."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.policies import RemovalReason
from lora_cache.sim import Belady, Future, Setup, next_uses, simulate
from tests.sim.traces import asking

NEVER = 2**32 - 1


def least_misses(asked: tuple[int, ...], slots: int) -> int:
    """Over every choice of victims there is."""

    @cache
    def least(position: int, held: frozenset[int]) -> int:
        if position == len(asked):
            return 0
        key = asked[position]
        if key in held:
            return least(position + 1, held)
        room = [held] if len(held) < slots else [held - {victim} for victim in held]
        return 1 + min(least(position + 1, rest | {key}) for rest in room)

    return least(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(asked=st.lists(st.integers(0, 4), min_size=1, max_size=14), slots=st.integers(1, 4))
def test_no_choice_of_victims_misses_less(asked: list[int], slots: int) -> None:
    (row,) = simulate(asking(asked), ["belady"], [slots])
    assert row.gpu_misses == least_misses(tuple(asked), slots) == row.belady_gpu_misses


@given(asked=st.lists(st.integers(0, 5), max_size=40))
def test_next_uses(asked: list[int]) -> None:
    expected = [
        next((later for later in range(at + 1, len(asked)) if asked[later] == key), NEVER)
        for at, key in enumerate(asked)
    ]
    assert list(next_uses(str(key) for key in asked)) == expected


def key_of(name: str) -> AdapterKey:
    return AdapterKey(f"test:{name}", name)


def test_the_contract_of_a_policy() -> None:
    """Ranks what is resident, the farthest first; asking changes nothing; a key may come back."""
    future = Future(next_uses("abcabcda"), "t")
    policy = Belady(future.next_use)

    def use(name: str, *, new: bool = False) -> None:
        future.arrive(key_of(name))
        if new:
            policy.on_insert(key_of(name), 1, 0.1, 0.0)
        policy.on_access(key_of(name), 0.0)

    def ranked() -> str:
        assert list(policy.rank_victims(0.0)) == list(policy.rank_victims(0.0))
        return "".join(key.name for key in policy.rank_victims(0.0))

    for name in "abc":
        use(name, new=True)
    assert ranked() == "cba"
    use("a")
    assert ranked() == "acb"
    policy.on_remove(key_of("a"), RemovalReason.EVICTED)
    assert ranked() == "cb"
    use("b")
    assert ranked() == "bc", "b never comes again"
    use("c")
    assert ranked() == "cb", "neither does c: the latest goes first, whatever the hashes are"
    use("d", new=True)
    use("a", new=True)
    assert sorted(ranked()) == list("abcd")


def test_a_trace_that_grows_while_it_is_read() -> None:
    future = Future(next_uses("a"), "growing.csv")
    future.arrive(key_of("a"))
    with pytest.raises(ConfigError, match=r"growing\.csv changes"):
        future.arrive(key_of("a"))


def test_it_is_at_its_best_in_host_memory_too() -> None:
    """Two tiers, both by Belady: as few come from disk as one tier of that size would miss."""
    asked = [0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 3, 4, 2, 0, 1, 3, 3, 4, 0, 2]
    (row,) = simulate(asking(asked), ["belady"], [1], Setup(host_entries=3))
    assert row.host_misses == least_misses(tuple(asked), 3)
