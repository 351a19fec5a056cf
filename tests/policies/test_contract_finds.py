"""The contract suite notices a policy that breaks the contract, whichever clause it is."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from typing import Any

import pytest

from lora_cache.adapter import AdapterKey
from lora_cache.policies import LRU, RemovalReason
from lora_cache.testing.policy_contract import PolicyContract


class MovesOnWhenAsked(LRU):
    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        if self._order:
            self._order.move_to_end(next(iter(self._order)))
        return iter(list(self._order))


class TakesWhenAsked(LRU):
    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        for key in list(self._order):
            used = self._order.pop(key)
            yield key
            self._order[key] = used


class RanksTwice(LRU):
    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter([*self._order, *list(self._order)[:1]])


class RanksOnlyWhatWasUsed(LRU):
    def __init__(self) -> None:
        super().__init__()
        self._used: set[AdapterKey] = set()

    def on_access(self, key: AdapterKey, now: float) -> None:
        super().on_access(key, now)
        self._used.add(key)

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return (key for key in self._order if key in self._used)


class HoldsEight(LRU):
    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        super().on_insert(key, nbytes, cost_s, now)
        if len(self._order) > 8:
            self._order.popitem(last=False)


class KeepsWhatWasUnloaded(LRU):
    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        if reason is RemovalReason.EVICTED:
            super().on_remove(key, reason)


class BelievesTheFirstWentFirst(LRU):
    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        self._order.popitem(last=False)


class ReturnsAList(LRU):
    def rank_victims(self, now: float) -> Any:
        return list(self._order)


class SharesItsState(LRU):
    everything: Any = LRU()._order

    def __init__(self) -> None:
        self._order = self.everything


class ComparesKeys(LRU):
    def __init__(self) -> None:
        super().__init__()
        self._last: dict[AdapterKey, float] = {}

    def on_access(self, key: AdapterKey, now: float) -> None:
        self._last[key] = now

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        heap: list[Any] = [(self._last.get(key, 0.0), key) for key in self._order]
        heapq.heapify(heap)
        return iter([heapq.heappop(heap)[1] for _ in range(len(heap))])


class DividesByBytes(LRU):
    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        super().on_insert(key, nbytes, cost_s / nbytes, now)


class Dices(LRU):
    def on_access(self, key: AdapterKey, now: float) -> None:
        self._order.move_to_end(key, last=random.random() < 0.5)


class IsNoPolicy:
    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return iter(())


BROKEN = [
    MovesOnWhenAsked,
    TakesWhenAsked,
    RanksTwice,
    RanksOnlyWhatWasUsed,
    HoldsEight,
    KeepsWhatWasUnloaded,
    BelievesTheFirstWentFirst,
    ReturnsAList,
    SharesItsState,
    ComparesKeys,
    DividesByBytes,
    Dices,
    IsNoPolicy,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_is_noticed(broken: type[Any]) -> None:
    class Contract(PolicyContract):
        def make_policy(self) -> Any:
            return broken()

    def run_all() -> None:
        for name in dir(Contract):
            if name.startswith("test_"):
                getattr(Contract(), name)()

    with pytest.raises(Exception) as caught:  # noqa: PT011  (an assertion, or the policy's own)
        run_all()
    assert not isinstance(caught.value, NotImplementedError)


def test_a_contract_without_a_policy_says_so() -> None:
    with pytest.raises(NotImplementedError, match="fresh policy"):
        PolicyContract().test_is_a_policy()
