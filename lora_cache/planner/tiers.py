"""One tier as the planner sees it: its copies, its budget, its policy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from lora_cache.key import AdapterKey
from lora_cache.policies import Policy, RemovalReason
from lora_cache.state import Copy, CopyState, Tier


@dataclass(frozen=True, slots=True)
class _Claim:
    """Room set aside by one transition: for the newcomer and the victims, whichever is more.

    Until the engine has answered either side may be the one that stays, so the room belongs to
    both; charging only the newcomer would let a third adapter into room that a failing load
    must give back.
    """

    newcomer: Copy | None
    victims: tuple[Copy, ...]

    @property
    def entries(self) -> int:
        return max(int(self.newcomer is not None), len(self.victims))

    @property
    def nbytes(self) -> int:
        return max(
            self.newcomer.nbytes if self.newcomer else 0, sum(v.nbytes for v in self.victims)
        )


class TierTable:
    """Copies of one tier, under a budget.

    Copies that no transition moves are *settled*; the others belong to the claim of their
    transition.  ``settled + claims`` never exceeds the budget, in entries and in bytes.
    """

    def __init__(
        self, tier: Tier, policy: Policy, max_entries: int, max_bytes: int | None = None
    ) -> None:
        self.tier = tier
        self.policy = policy
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self._copies: dict[AdapterKey, Copy] = {}
        self._claims: dict[int, _Claim] = {}
        self._entries = 0  # settled copies, and the entries of the claims
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._copies)

    def __iter__(self) -> Iterator[Copy]:
        return iter(self._copies.values())

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._copies

    def get(self, key: AdapterKey) -> Copy | None:
        return self._copies.get(key)

    def is_ready(self, key: AdapterKey) -> bool:
        copy = self._copies.get(key)
        return copy is not None and copy.state is CopyState.READY

    @property
    def used_entries(self) -> int:
        return self._entries

    @property
    def used_bytes(self) -> int:
        return self._nbytes

    def room_for(self, nbytes: int, candidates: Iterable[AdapterKey]) -> list[AdapterKey] | None:
        """Victims that make room for one more copy, or None when `candidates` do not suffice.

        Args:
            nbytes: bytes of the newcomer in this tier.
            candidates: evictable keys, best victim first; consumed only as far as needed.
        """
        entries = self._entries + 1 - self.max_entries
        excess = 0 if self.max_bytes is None else self._nbytes + nbytes - self.max_bytes
        victims: list[AdapterKey] = []
        source = iter(candidates)
        while entries > 0 or excess > 0:
            key = next(source, None)
            if key is None:
                return None
            victims.append(key)
            entries -= 1
            excess -= self._copies[key].nbytes
        return victims

    def ranked(self, now: float, evictable: Callable[[Copy], bool]) -> Iterator[AdapterKey]:
        """Keys that may be evicted, in the policy's order."""
        for key in self.policy.rank_victims(now):
            if evictable(self._copies[key]):
                yield key

    def begin(
        self,
        op: int,
        newcomer: AdapterKey | None,
        nbytes: int,
        victims: Iterable[AdapterKey],
        now: float,
    ) -> None:
        """Set aside the room for a transition: the newcomer is LOADING, victims are DRAINING."""
        leaving = tuple(self._copies[key] for key in victims)
        for copy in leaving:
            if copy.state is CopyState.READY:
                copy.move(CopyState.DRAINING, now)
            copy.op = op
            self._entries -= 1
            self._nbytes -= copy.nbytes
        arriving = None
        if newcomer is not None:
            arriving = Copy(newcomer, self.tier, nbytes, now, op=op)
            self._copies[newcomer] = arriving
        claim = self._claims[op] = _Claim(arriving, leaving)
        self._entries += claim.entries
        self._nbytes += claim.nbytes

    def commit(self, op: int, reason: RemovalReason, cost_s: float, now: float) -> list[AdapterKey]:
        """The transition succeeded: victims are gone, the newcomer is READY.

        Returns:
            the keys that left.
        """
        claim = self._settle(op)
        for copy in claim.victims:
            self._forget(copy, reason, now)
        if (new := claim.newcomer) is not None:
            new.op = None
            new.move(CopyState.READY, now)
            self._charge(new)
            self.policy.on_insert(new.key, new.nbytes, cost_s, now)
        return [copy.key for copy in claim.victims]

    def abort(self, op: int, gone: Collection[AdapterKey], now: float) -> None:
        """The transition failed: the newcomer never was, victims not in `gone` are READY again."""
        claim = self._settle(op)
        if (new := claim.newcomer) is not None:
            new.move(CopyState.FAILED, now)
            del self._copies[new.key]
        for copy in claim.victims:
            if copy.key in gone:
                self._forget(copy, RemovalReason.EVICTED, now)
                continue
            copy.op = None
            copy.move(CopyState.READY, now)
            self._charge(copy)

    def lose(self, key: AdapterKey, now: float) -> None:
        """The engine does not hold this settled copy any more."""
        copy = self._copies[key]
        self._entries -= 1
        self._nbytes -= copy.nbytes
        self._forget(copy, RemovalReason.REMOVED, now)

    def adopt(self, key: AdapterKey, now: float) -> None:
        """The engine holds a copy that nobody asked for: account for it, if there is room."""
        if self.room_for(0, ()) is not None:
            copy = self._copies[key] = Copy(key, self.tier, 0, now)
            copy.move(CopyState.READY, now)
            self._charge(copy)
            self.policy.on_insert(key, 0, 0.0, now)

    def check(self) -> None:
        """Assert the accounting (tests)."""
        settled = [copy for copy in self if copy.op is None]
        claims = self._claims.values()
        assert all(copy.state is not CopyState.LOADING for copy in settled)
        assert {copy.op for copy in self} - {None} <= set(self._claims)
        assert self._entries == len(settled) + sum(c.entries for c in claims) <= self.max_entries
        assert self._nbytes == sum(c.nbytes for c in settled) + sum(c.nbytes for c in claims)
        assert self.max_bytes is None or self._nbytes <= self.max_bytes

    def _settle(self, op: int) -> _Claim:
        claim = self._claims.pop(op)
        self._entries -= claim.entries
        self._nbytes -= claim.nbytes
        return claim

    def _charge(self, copy: Copy) -> None:
        self._entries += 1
        self._nbytes += copy.nbytes

    def _forget(self, copy: Copy, reason: RemovalReason, now: float) -> None:
        copy.op = None
        copy.move(CopyState.GONE, now)
        del self._copies[copy.key]
        self.policy.on_remove(copy.key, reason)
