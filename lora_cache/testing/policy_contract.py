"""The tests that every eviction policy must pass.

In a test file of your own::

    from lora_cache.testing.policy_contract import PolicyContract

    class TestMine(PolicyContract):
        def make_policy(self):
            return Mine()

Needs pytest to run it and Hypothesis to find the orders of events that break it (``pip install
'lora-cache[testing]'``); importing this module needs neither.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import islice, product
from typing import TYPE_CHECKING

from lora_cache.key import AdapterKey
from lora_cache.policies import Policy, RemovalReason, explain

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_START_S = 1e6  # a monotonic clock begins anywhere

#: What happens, the adapter (or the place in the ranking) it happens to, seconds since the last.
Step = tuple[str, int, float]
_STEPS = ("load", "prefetch", "use", "use", "evict first", "evict any", "unload", "ask")
_SECONDS = (0.0, 0.0, 0.5, 90.0, 1e5)
# The slot tier charges no bytes, and a copy that the engine already held has cost nothing.
_NBYTES = (0, 1, 1, 3, 1 << 40)
_COST_S = (0.0, 0.1, 0.1, 300.0)


def _key(number: int) -> AdapterKey:
    return AdapterKey(f"contract:{number}", f"a{number}")


class _Tier:
    """Notifies a policy as the planner would, and keeps the books that it must agree with."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.resident: dict[AdapterKey, None] = {}
        self.notices: list[Callable[[Policy], None]] = []  # to tell another policy the same
        self.now = _START_S

    def insert(self, number: int) -> None:
        key, now = _key(number), self.now
        nbytes, cost_s = _NBYTES[number % len(_NBYTES)], _COST_S[number % len(_COST_S)]
        self._tell(lambda policy: policy.on_insert(key, nbytes, cost_s, now))
        self.resident[key] = None

    def access(self, key: AdapterKey) -> None:
        now = self.now
        self._tell(lambda policy: policy.on_access(key, now))

    def remove(self, key: AdapterKey, reason: RemovalReason = RemovalReason.EVICTED) -> None:
        self._tell(lambda policy: policy.on_remove(key, reason))
        del self.resident[key]

    def step(self, kind: str, number: int, seconds: float) -> None:
        """Do what is possible of a step: nothing is evicted from an empty tier, and so on."""
        self.now += seconds
        key = _key(number)
        if kind in ("load", "prefetch") and key not in self.resident:
            self.insert(number)
            if kind == "load":
                self.access(key)
        elif kind == "use" and key in self.resident:
            self.access(key)
        elif kind == "unload" and key in self.resident:
            self.remove(key, RemovalReason.REMOVED)
        elif kind == "evict first" and self.resident:
            victim = next(self.policy.rank_victims(self.now), None)
            assert victim is not None, "ranks nothing though something is resident"
            self.remove(victim)
        elif kind == "evict any" and self.resident:  # the planner skipped the ones before it
            self.remove(self.ranking()[number % len(self.resident)])
        elif kind == "ask":
            list(islice(self.policy.rank_victims(self.now), number))

    def ranking(self) -> list[AdapterKey]:
        """What the policy ranks, after checking that it is what is resident."""
        ranked = list(self.policy.rank_victims(self.now))
        assert len(ranked) == len(set(ranked)), f"ranks a key twice: {_names(ranked)}"
        missing, gone = self.resident.keys() - set(ranked), set(ranked) - self.resident.keys()
        assert not missing, f"does not rank {_names(missing)}, which {_is(missing)} resident"
        assert not gone, f"ranks {_names(gone)}, which {_is(gone)} not resident"
        return ranked

    def _tell(self, notice: Callable[[Policy], None]) -> None:
        self.notices.append(notice)
        notice(self.policy)


class PolicyContract:
    """Subclass it in a class whose name pytest collects, and say how the policy is made.

    Hypothesis makes up the events: adapters are loaded for a request, prefetched, used, evicted
    in the order of the ranking and out of it, unloaded, while time stands still, passes or jumps.
    """

    def make_policy(self) -> Policy:
        """Return a fresh policy; called several times in a test."""
        raise NotImplementedError("return a fresh policy")

    def test_is_a_policy(self) -> None:
        policy = self.make_policy()
        assert isinstance(policy, Policy), "a method of lora_cache.policies.Policy is missing"
        assert list(policy.rank_victims(_START_S)) == [], "ranks something before any insert"
        ranking = policy.rank_victims(_START_S)
        assert iter(ranking) is ranking, "rank_victims must return an iterator, e.g. iter(list)"

    def test_ranks_what_is_resident_and_each_key_once(self) -> None:
        def check(steps: list[Step]) -> None:
            tier = _Tier(self.make_policy())
            for step in steps:
                tier.step(*step)
                tier.ranking()

        _for_all_steps(check)

    def test_asking_changes_nothing(self) -> None:
        """What was asked, in whole or in part, ranks as what was only notified."""

        def check(steps: list[Step]) -> None:
            asked = _Tier(self.make_policy())
            for step in steps:
                asked.step(*step)
                assert asked.ranking() == asked.ranking(), "two answers to one question"
            unasked = self.make_policy()
            for notice in asked.notices:
                notice(unasked)
            assert list(unasked.rank_victims(asked.now)) == asked.ranking(), (
                "ranks otherwise when it was asked in between"
            )

        _for_all_steps(check)

    def test_two_rankings_at_a_time_do_not_disturb_each_other(self) -> None:
        tier = self._filled(8)
        whole = tier.ranking()
        first, second = tier.policy.rank_victims(tier.now), tier.policy.rank_victims(tier.now)
        taken = list(islice(first, 3))
        both = list(second), taken + list(first)
        assert both == (whole, whole), "a second ranking changes the first, or the other way round"

    def test_the_same_events_give_the_same_ranking(self) -> None:
        """A trace can be replayed: nothing but the events decides, and instances share nothing."""

        def check(steps: list[Step]) -> None:
            tier = _Tier(self.make_policy())
            for step in steps:
                tier.step(*step)
            bystander, again = self.make_policy(), self.make_policy()
            for notice in tier.notices:
                notice(again)
            assert list(again.rank_victims(tier.now)) == tier.ranking(), (
                "ranks otherwise after the same events"
            )
            assert list(bystander.rank_victims(tier.now)) == [], "instances share their state"

        _for_all_steps(check)

    def test_a_key_that_left_may_come_back(self) -> None:
        for reason in RemovalReason:
            tier = self._filled(3)
            for _ in range(3):
                tier.remove(_key(1), reason)
                tier.ranking()
                tier.now += 1.0
                tier.insert(1)
                tier.ranking()

    def test_any_key_may_be_the_victim(self) -> None:
        """The planner skips what is in use, so it may well take the last one of a ranking."""
        for position in (0, -1, 5):
            tier = self._filled(12)
            while tier.resident:
                ranked = tier.ranking()
                tier.remove(ranked[max(-len(ranked), min(position, len(ranked) - 1))])

    def test_what_is_never_used_is_ranked_too(self) -> None:
        tier = _Tier(self.make_policy())
        for number in range(6):
            tier.insert(number)
        assert len(tier.ranking()) == 6
        tier.remove(tier.ranking()[0])
        tier.access(tier.ranking()[-1])
        tier.ranking()

    def test_words_for_a_rank_change_nothing(self) -> None:
        """Only where the policy has some: see `Explains`."""
        tier = self._filled(5)
        before = tier.ranking()
        for key in before:
            assert explain(tier.policy, key, tier.now).strip()
        assert tier.ranking() == before

    def test_many_keys_and_many_uses(self) -> None:
        rng = random.Random(0)
        tier = self._filled(2000)
        for _ in range(10_000):
            tier.now += rng.choice(_SECONDS[:3])
            tier.access(_key(min(int(rng.expovariate(0.01)), 1999)))
        while tier.resident:  # in portions, as one large newcomer takes several
            for victim in tier.ranking()[:200]:
                tier.remove(victim)

    def _filled(self, size: int) -> _Tier:
        tier = _Tier(self.make_policy())
        for number in range(size):
            tier.step("load", number, 1.0)
        return tier


def _for_all_steps(check: Callable[[list[Step]], None]) -> None:
    """Look for steps that fail `check`.

    The test is made here, each time that it is run: Hypothesis asks for one class per test, and a
    decorated method would be inherited by many.
    """
    from hypothesis import Phase, given, settings

    # "explain" runs a failure many times under a tracer, to no use for a list of events.
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
    settings(deadline=None, phases=phases)(given(steps=_steps())(check))()


def _steps() -> SearchStrategy[list[Step]]:
    from hypothesis import strategies as st

    # One draw a step: three take three times as long.
    every_step = list(product(_STEPS, range(10), _SECONDS))
    return st.lists(st.sampled_from(every_step), max_size=50)


def _names(keys: Iterable[AdapterKey]) -> str:
    return ", ".join(sorted(key.name for key in keys))


def _is(keys: set[AdapterKey]) -> str:
    return "is" if len(keys) == 1 else "are"
