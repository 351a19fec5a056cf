"""One tier as the planner sees it: its copies, its budget, its policy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from lora_cache.key import AdapterKey
from lora_cache.policies import Policy, RemovalReason
from lora_cache.state import Copy, CopyState, Tier

# Looked up once: in Python 3.11 an attribute of an Enum takes as long as three calls.
_LOADING, _READY = CopyState.LOADING, CopyState.READY
_DRAINING, _GONE = CopyState.DRAINING, CopyState.GONE


#: Room set aside by one transition: newcomer, victims, entries, bytes.  The room is for the
#: newcomer or for the victims, whichever need more: until the engine has answered either side may
#: be the one that stays, so it belongs to both; charging only the newcomer would let a third
#: adapter into room that a failing load must give back.
_Claim = tuple[Copy | None, list[Copy], int, int]


class TierTable:
    """Copies of one tier, under a budget.

    Copies that no transition moves are *settled*; the others belong to the claim of their
    transition.  ``settled + claims`` never exceeds the budget, in entries and in bytes.

    Attributes:
        target: bytes to come down to while memory is scarce, or None.  Unlike `max_bytes` it keeps
            nobody out: it is exceeded by what cannot leave, and by nothing else.
    """

    def __init__(
        self, tier: Tier, policy: Policy, max_entries: int, max_bytes: int | None = None
    ) -> None:
        self.tier = tier
        self.policy = policy
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.target: int | None = None
        self.copies: dict[AdapterKey, Copy] = {}
        self.get = self.copies.get
        self.claims: dict[int, _Claim] = {}
        self._entries = 0  # settled copies, and the entries of the claims
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self.copies)

    def __iter__(self) -> Iterator[Copy]:
        return iter(self.copies.values())

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self.copies

    def is_ready(self, key: AdapterKey) -> bool:
        copy = self.copies.get(key)
        return copy is not None and copy.state is _READY

    @property
    def used_entries(self) -> int:
        return self._entries

    @property
    def used_bytes(self) -> int:
        return self._nbytes

    def room_for(
        self, nbytes: int, evictable: Callable[[Copy], bool], now: float
    ) -> list[AdapterKey] | None:
        """Victims that make room for one more copy, the policy's best ones; None for too few.

        The policy is asked only if there is no room, and only as far as needed.

        Args:
            nbytes: bytes of the newcomer in this tier.
        """
        entries = self._entries + 1 - self.max_entries
        excess = 0 if self.max_bytes is None else self._nbytes + nbytes - self.max_bytes
        surplus = 0 if self.target is None else self._surplus(nbytes)
        victims: list[AdapterKey] = []
        if entries <= 0 and excess <= 0 and surplus <= 0:
            return victims
        for key in self.policy.rank_victims(now):
            copy = self.copies[key]
            if evictable(copy):
                victims.append(key)
                entries -= 1
                excess -= copy.nbytes
                surplus -= copy.nbytes
                if entries <= 0 and excess <= 0 and surplus <= 0:
                    return victims
        return victims if entries <= 0 and excess <= 0 else None

    def beyond_target(self, evictable: Callable[[Copy], bool], now: float) -> list[AdapterKey]:
        """Who must leave to come down to the target, the policy's best ones, as far as they may."""
        surplus = self._surplus(0)
        victims: list[AdapterKey] = []
        if surplus > 0:
            for key in self.ranked(evictable, now):
                victims.append(key)
                surplus -= self.copies[key].nbytes
                if surplus <= 0:
                    break
        return victims

    def _surplus(self, more: int) -> int:
        """Bytes beyond the target, `more` included, when all that moves has arrived or left."""
        if self.target is None or self._nbytes + more <= self.target:
            return 0
        staying = sum(copy.nbytes for copy in self if copy.state is not _DRAINING)
        return staying + more - self.target

    def ranked(self, evictable: Callable[[Copy], bool], now: float) -> Iterator[AdapterKey]:
        """Keys that may be evicted, in the policy's order."""
        return (key for key in self.policy.rank_victims(now) if evictable(self.copies[key]))

    def begin(
        self,
        op: int,
        newcomer: AdapterKey | None,
        nbytes: int,
        victims: Iterable[AdapterKey],
        now: float,
    ) -> None:
        """Set aside the room for a transition: the newcomer is LOADING, victims are DRAINING."""
        leaving = []
        freed = 0
        for key in victims:
            copy = self.copies[key]
            if copy.state is _READY:
                copy.move(_DRAINING, now)
            copy.op = op
            freed += copy.nbytes
            leaving.append(copy)
        arriving, claimed, entries = None, freed, len(leaving)
        if newcomer is not None:
            arriving = Copy(newcomer, self.tier, nbytes, now, _LOADING, op)
            self.copies[newcomer] = arriving
            if nbytes > freed:
                claimed = nbytes
            if not leaving:
                entries = 1
                self._entries += 1
        if entries:  # else nothing moves in this tier
            self.claims[op] = (arriving, leaving, entries, claimed)
            self._nbytes += claimed - freed

    def commit(
        self,
        op: int,
        reason: RemovalReason,
        cost_s: float,
        now: float,
        taken: int | None = None,
    ) -> int:
        """The transition succeeded: victims are gone, the newcomer is READY.

        Args:
            taken: bytes of the newcomer, if that is less than it was charged.

        Returns:
            how many copies left.
        """
        claim = self.claims.pop(op, None)
        if claim is None:
            return 0
        new, victims, entries, nbytes = claim
        for copy in victims:
            self._forget(copy, reason, now)
        if new is not None:
            if taken is not None and taken < new.nbytes:
                new.nbytes = taken
            new.op = None
            new.move(_READY, now)
            entries -= 1
            nbytes -= new.nbytes
            self.policy.on_insert(new.key, new.nbytes, cost_s, now)
        self._entries -= entries
        self._nbytes -= nbytes
        return len(victims)

    def abort(self, op: int, gone: Collection[AdapterKey], now: float) -> None:
        """The transition failed: the newcomer never was, victims not in `gone` are READY again."""
        if op not in self.claims:
            return
        new, victims, entries, nbytes = self.claims.pop(op)
        self._entries -= entries
        self._nbytes -= nbytes
        if new is not None:
            new.move(CopyState.FAILED, now)
            del self.copies[new.key]
        for copy in victims:
            if copy.key in gone:
                self._forget(copy, RemovalReason.EVICTED, now)
                continue
            copy.op = None
            copy.move(_READY, now)
            self._charge(copy)

    def lose(self, key: AdapterKey, now: float) -> None:
        """The engine does not hold this settled copy any more."""
        copy = self.copies[key]
        self._entries -= 1
        self._nbytes -= copy.nbytes
        self._forget(copy, RemovalReason.REMOVED, now)

    def adopt(self, key: AdapterKey, now: float) -> None:
        """The engine holds a copy that nobody asked for: account for it, if there is room."""
        if self.room_for(0, lambda copy: False, now) is not None:
            copy = self.copies[key] = Copy(key, self.tier, 0, now)
            copy.move(_READY, now)
            self._charge(copy)
            self.policy.on_insert(key, 0, 0.0, now)

    def check(self) -> None:
        """Assert the accounting (tests)."""
        settled = [copy for copy in self if copy.op is None]
        claims = [(entries, nbytes) for _, _, entries, nbytes in self.claims.values()]
        assert all(copy.state is not CopyState.LOADING for copy in settled)
        assert {copy.op for copy in self} - {None} <= set(self.claims)
        assert self._entries == len(settled) + sum(c[0] for c in claims) <= self.max_entries
        assert self._nbytes == sum(c.nbytes for c in settled) + sum(c[1] for c in claims)
        assert self.max_bytes is None or self._nbytes <= self.max_bytes

    def _charge(self, copy: Copy) -> None:
        self._entries += 1
        self._nbytes += copy.nbytes

    def _forget(self, copy: Copy, reason: RemovalReason, now: float) -> None:
        copy.op = None
        copy.move(_GONE, now)
        del self.copies[copy.key]
        self.policy.on_remove(copy.key, reason)
