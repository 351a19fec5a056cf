"""Tiers, and the life of one copy of an adapter in one tier.

The table of transitions is data, so that it can be drawn, tested and enforced in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from lora_cache.key import AdapterKey


class Tier(StrEnum):
    """Where a copy lies.  The Hub is a source, not a tier."""

    GPU = "gpu"
    HOST = "host"
    DISK = "disk"


class CopyState(StrEnum):
    """The state of one copy: of one key in one tier."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    GONE = "gone"


TRANSITIONS: Mapping[CopyState, frozenset[CopyState]] = MappingProxyType(
    {
        CopyState.GONE: frozenset({CopyState.LOADING}),
        CopyState.LOADING: frozenset({CopyState.READY, CopyState.FAILED}),
        # READY → GONE without draining happens only when the engine lost the copy (reconcile).
        CopyState.READY: frozenset({CopyState.DRAINING, CopyState.GONE}),
        # DRAINING → READY: the load that needed the room failed, or nobody needs it any more.
        CopyState.DRAINING: frozenset({CopyState.READY, CopyState.GONE}),
        CopyState.FAILED: frozenset({CopyState.LOADING, CopyState.GONE}),
    }
)


class IllegalTransitionError(AssertionError):
    """A defect of this package: a copy was moved along an arrow that is not in the table."""


@dataclass(slots=True, eq=False)
class Copy:
    """One key in one tier.

    Attributes:
        nbytes: what the copy is charged in this tier, in bytes.
        since: time of the last change of state, in the planner's clock.
        op: the transition in flight that moves this copy, or None.
    """

    key: AdapterKey
    tier: Tier
    nbytes: int
    since: float
    state: CopyState = CopyState.LOADING
    op: int | None = None

    def move(self, state: CopyState, now: float) -> None:
        """Change state.

        Raises:
            IllegalTransitionError: the table has no such arrow.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(
                f"{self.key} in {self.tier}: {self.state} → {state} is not allowed"
            )
        self.state = state
        self.since = now
