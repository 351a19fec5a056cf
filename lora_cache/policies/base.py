"""The contract of an eviction policy: it is notified, then asked, and asking changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Protocol, runtime_checkable

from lora_cache.key import AdapterKey


class RemovalReason(StrEnum):
    """Why a copy left its tier."""

    EVICTED = "evicted"  #: this policy ranked it, and the planner took it
    REMOVED = "removed"  #: unloaded by an operator, or lost by the engine


@runtime_checkable
class Policy(Protocol):
    """Ranks the copies of one tier.  One instance serves one tier of one cache.

    The planner calls from one thread.  ``now`` is seconds on the caller's clock and never goes
    back; policies read no clock of their own, so that a trace can be replayed.  A copy that is
    loaded because of a request is inserted and then accessed; one that is prefetched is only
    inserted.
    """

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        """`key` has become ready in the tier.

        Args:
            nbytes: bytes that the copy occupies in this tier.
            cost_s: seconds that the load took, i.e. what evicting it puts at stake.
        """

    def on_access(self, key: AdapterKey, now: float) -> None:
        """A request was admitted with `key`, which is in the tier."""

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        """`key` has left the tier."""

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        """Yield every key of the tier once, the best victim first.

        Lazy: the planner usually takes one or two and drops the iterator.  Pure: asking again
        gives the same order, and nothing that is asked changes what happens later.  The planner
        skips what is leased or pinned; between two calls of ``next`` nothing is notified.
        """
        ...


@runtime_checkable
class Explains(Protocol):
    """What a policy may have besides: words for why it ranks a key where it does."""

    def explain(self, key: AdapterKey, now: float) -> str:
        """A clause such as ``"last used 12 s ago"``.  `key` is in the tier; pure."""
        ...


def explain(policy: Policy, key: AdapterKey, now: float) -> str:
    """The policy's own words for where `key` ranks, or the least that can be said."""
    # Not isinstance: that looks through a protocol's attributes each time, fifty times as long.
    own = getattr(policy, "explain", None)
    return own(key, now) if own else f"as {type(policy).__name__} ranks it"
