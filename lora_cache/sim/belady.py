"""The optimal policy, for who knows the future: evict what is used again last (Belady's MIN).

It needs to be told what comes, so it exists in the simulator only.  Its memory grows with the
length of the trace, by four bytes a request; that of no other policy does.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.policies import RemovalReason

_NEVER = 2**32 - 1


def next_uses(adapters: Iterable[str]) -> array[int]:
    """For each request, the position of the next one for the same adapter, or 2**32 − 1."""
    numbers: dict[str, int] = {}
    uses = array("I", (numbers.setdefault(name, len(numbers)) for name in adapters))
    upcoming = array("I", [_NEVER]) * len(numbers)
    for position in range(len(uses) - 1, -1, -1):  # in place: what is read is behind us
        number = uses[position]
        uses[position] = upcoming[number]
        upcoming[number] = position
    return uses


class Future:
    """What comes after the present request.  One for each replay; the policies look into it.

    Attributes:
        next_use: for each adapter that was asked for, a number that is larger the later it is
            asked for again; different for each adapter.
    """

    def __init__(self, uses: array[int], trace: str) -> None:
        self._uses = uses
        self._trace = trace
        self._position = 0
        self.next_use: dict[AdapterKey, int] = {}

    def arrive(self, key: AdapterKey) -> None:
        """The next request of the trace comes, and asks for `key`.

        Raises:
            ConfigError: there are more requests than there were.
        """
        try:
            use = self._uses[self._position]
        except IndexError:
            raise ConfigError(
                f"{self._trace} changes while it is being read: copy it, or leave Belady out"
            ) from None
        # Of those that never come again any may go first, but the order must not depend on
        # anything else than the trace.
        self.next_use[key] = use if use != _NEVER else _NEVER + self._position
        self._position += 1


class Belady:
    """Evicts what is asked for again last.

    With copies of one size and leases that end at once no policy has fewer misses.  Where leases
    are held it is a policy with foresight, and not a bound.

    Args:
        next_use: see `Future`.
    """

    def __init__(self, next_use: Mapping[AdapterKey, int]) -> None:
        self._next_use = next_use
        self._use_of: dict[AdapterKey, int] = {}
        self._key_at: dict[int, AdapterKey] = {}
        self._order: list[int] = []  # the values of `_use_of`, ascending

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        self._place(key)

    def on_access(self, key: AdapterKey, now: float) -> None:
        if self._use_of[key] != self._next_use[key]:
            self._take(key)
            self._place(key)

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        self._take(key)

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        return map(self._key_at.__getitem__, reversed(self._order))

    def _place(self, key: AdapterKey) -> None:
        use = self._use_of[key] = self._next_use[key]
        self._key_at[use] = key
        insort(self._order, use)

    def _take(self, key: AdapterKey) -> None:
        use = self._use_of.pop(key)
        del self._key_at[use]
        del self._order[bisect_left(self._order, use)]
