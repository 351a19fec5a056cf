"""Every policy keeps the contract: notified, then asked, and asking changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.adapter import AdapterKey
from lora_cache.errors import ConfigError
from lora_cache.policies import LFU, LRU, Policy, RemovalReason, make_policy, policy_names
from lora_cache.testing import RandomPolicy

POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "lfu": LFU,
    "lfu-inf": lambda: LFU(math.inf),
    "random": RandomPolicy,
}
EVENTS = st.lists(
    st.tuples(st.sampled_from(["insert", "access", "remove", "ask"]), st.integers(0, 9)),
    max_size=60,
)


def key_of(number: int) -> AdapterKey:
    return AdapterKey(f"k:{number}")


def play(policy: Policy, events: list[tuple[str, int]]) -> Iterator[set[AdapterKey]]:
    """Notify a policy as the planner would; yields what is resident after each event."""
    resident: set[AdapterKey] = set()
    for now, (kind, number) in enumerate(events):
        key = key_of(number)
        if kind == "insert" and key not in resident:
            policy.on_insert(key, 1 + number, 0.1, float(now))
            resident.add(key)
        elif kind == "access" and key in resident:
            policy.on_access(key, float(now))
        elif kind == "remove" and key in resident:
            policy.on_remove(key, RemovalReason.EVICTED if number % 2 else RemovalReason.REMOVED)
            resident.remove(key)
        elif kind == "ask":
            next(policy.rank_victims(float(now)), None)
        yield resident


@pytest.mark.parametrize("name", POLICIES)
class TestContract:
    @given(events=EVENTS)
    def test_ranks_exactly_what_is_resident(self, name: str, events: list[tuple[str, int]]) -> None:
        policy = POLICIES[name]()
        for resident in play(policy, events):
            ranked = list(policy.rank_victims(100.0))
            assert len(ranked) == len(resident)
            assert set(ranked) == resident

    @given(events=EVENTS)
    def test_asking_changes_nothing(self, name: str, events: list[tuple[str, int]]) -> None:
        asked, unasked = POLICIES[name](), POLICIES[name]()
        for _ in play(asked, events):
            assert list(asked.rank_victims(100.0)) == list(asked.rank_victims(100.0))
        for _ in play(unasked, [event for event in events if event[0] != "ask"]):
            pass
        assert list(asked.rank_victims(100.0)) == list(unasked.rank_victims(100.0))

    def test_ranking_is_lazy(self, name: str) -> None:
        policy = POLICIES[name]()
        for number in range(5):
            policy.on_insert(key_of(number), 1, 0.1, 0.0)
        ranking = policy.rank_victims(1.0)
        assert next(ranking) in {key_of(number) for number in range(5)}

    def test_a_removed_key_may_come_back(self, name: str) -> None:
        policy = POLICIES[name]()
        policy.on_insert(key_of(1), 1, 0.1, 0.0)
        policy.on_remove(key_of(1), RemovalReason.EVICTED)
        policy.on_insert(key_of(1), 1, 0.1, 5.0)
        assert list(policy.rank_victims(6.0)) == [key_of(1)]


def test_lfu_forgets_with_time() -> None:
    """An adapter that was hot ten half-lives ago loses to one that is warm now."""
    policy = LFU(half_life_s=10.0)
    for number in (1, 2):
        policy.on_insert(key_of(number), 1, 0.1, 0.0)
    for _ in range(50):
        policy.on_access(key_of(1), 0.0)
    policy.on_access(key_of(2), 1.0)
    assert next(policy.rank_victims(1.0)) == key_of(2)
    for _ in range(3):
        policy.on_access(key_of(2), 100.0)
    assert next(policy.rank_victims(100.0)) == key_of(1)


def test_lfu_counts_decay_by_the_formula() -> None:
    """Uses at t=0 and t=10 weigh 1/2 + 1 = 1.5 with a half-life of 10; two at t=10 weigh 2."""
    policy = LFU(half_life_s=10.0)
    policy.on_insert(key_of(1), 1, 0.1, 0.0)
    policy.on_insert(key_of(2), 1, 0.1, 10.0)
    policy.on_access(key_of(2), 10.0)
    policy.on_access(key_of(1), 10.0)  # most recent, but lighter
    assert next(policy.rank_victims(10.0)) == key_of(1)


def test_policies_by_name() -> None:
    assert {"lru", "lfu"} <= set(policy_names())
    assert isinstance(make_policy("lru"), LRU)
    assert isinstance(make_policy(lambda: LFU(math.inf)), LFU)
    with pytest.raises(ConfigError, match="unknown policy 'mru'"):
        make_policy("mru")
    with pytest.raises(ConfigError, match="not a Policy"):
        make_policy(dict)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="half_life_s"):
        LFU(0)
