"""Loads that nobody waits for take turns, so that those that somebody waits for need not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lora_cache.planner.waiting import Ticket


class Speculation:
    """A few loads at a time; the rest is put off, first come first served.

    An engine that was handed a hundred of them would do them in order, and a lease on the last
    one would wait for all.  What is put off is not begun: a lease on it goes at once.

    Args:
        most: loads at a time, or None for any number.

    Attributes:
        under_way: how many have begun and not ended.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        # Ordered: the first of a dict is found in time that grows with what has left it.
        self._later: OrderedDict[int, Ticket] = OrderedDict()
        self.under_way = 0

    def __iter__(self) -> Iterator[Ticket]:
        """What is put off, the next one first."""
        return iter(self._later.values())

    @property
    def is_full(self) -> bool:
        """Another one has to be put off."""
        return self._most is not None and self.under_way >= self._most

    def put_off(self, ticket: Ticket) -> None:
        self._later[ticket.number] = ticket

    def withdraw(self, number: int) -> None:
        """The caller does not wait any more."""
        self._later.pop(number, None)

    def take(self) -> Ticket | None:
        """Whose turn it is now, if there is one; it is no longer put off."""
        if self.is_full or not self._later:
            return None
        return self._later.popitem(last=False)[1]

    def check(self, under_way: int) -> None:
        """Assert that nobody is put off without need.

        Args:
            under_way: how many there really are.
        """
        assert self.under_way == under_way, "a turn was lost"
        assert self.is_full or not self._later, "a prefetch has missed its turn"
