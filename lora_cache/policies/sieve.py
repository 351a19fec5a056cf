"""SIEVE: a queue with a hand that spares what was used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from lora_cache.key import AdapterKey
from lora_cache.policies.base import RemovalReason


class Sieve:
    """Evicts the next copy that was not used since the hand last passed (Zhang et al., NSDI 2024).

    Copies stay in the order in which they came.  The hand moves from the oldest to the newest,
    then begins again; it spares each copy that was used again since, once, and newcomers come in
    behind all others, not behind the hand.  Asking looks ahead of the hand; only when a victim has
    left does the hand move there, past what the planner would not take.

    An access is O(1), a victim O(1) amortised.  The use that a copy was loaded for is its first,
    so the access after an insert is not a use *again*.
    """

    def __init__(self) -> None:
        # The queue, oldest first, is `_passed` + `_ahead`: the hand points at the first of
        # `_ahead`.  Values of `_passed`: the copy was unused and left alone when the hand passed.
        self._passed: OrderedDict[AdapterKey, bool] = OrderedDict()
        self._ahead: OrderedDict[AdapterKey, bool] = OrderedDict()
        self._used: set[AdapterKey] = set()  # again, since the hand last passed
        self._unused: set[AdapterKey] = set()  # since they were inserted

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        self._ahead[key] = False
        self._unused.add(key)

    def on_access(self, key: AdapterKey, now: float) -> None:
        if key in self._unused:
            self._unused.remove(key)
        else:
            self._used.add(key)

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        # A victim that the hand has just passed over as unused was on its way out already, and
        # another one left sooner: the hand need not go round for it.
        if reason is RemovalReason.EVICTED and not self._passed.get(key, False):
            self._move_hand_to(key)
        del (self._ahead if key in self._ahead else self._passed)[key]
        self._used.discard(key)
        self._unused.discard(key)
        self._turn()

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        for key in chain(self._ahead, self._passed):
            if key not in self._used:
                yield key
        for key in chain(self._ahead, self._passed):  # all were spared once: the second round
            if key in self._used:
                yield key

    def explain(self, key: AdapterKey, now: float) -> str:
        again = "" if key in self._used else "not "
        return f"{again}used again since the hand last passed"

    def _move_hand_to(self, victim: AdapterKey) -> None:
        if victim in self._used:
            self._used.clear()  # a whole round, and then on to the victim
        while (key := next(iter(self._ahead))) != victim:
            del self._ahead[key]
            self._passed[key] = key not in self._used
            self._used.discard(key)
            self._turn()

    def _turn(self) -> None:
        """Past the newest copy comes the oldest one."""
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead
