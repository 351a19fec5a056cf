"""What a simulation is told beside trace, policy and slots; and a replay made of all that."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.planner import DRAIN_AFTER_S, Limits
from lora_cache.policies import Policy, PolicyLike, RemovalReason, make_policy, policy_names
from lora_cache.sim.belady import Belady, Future
from lora_cache.sim.cost import RESIDENT, TYPICAL_NBYTES, TransferCost
from lora_cache.sim.hold import Hold
from lora_cache.sim.replay import HeldReplay, InstantReplay, Replay

#: How the engines load: at what cost, and how many at a time.
ENGINES: dict[str, dict[str, Any]] = {
    "stock": {"cost": TransferCost(), "max_in_flight": 1, "stages_without_slot": False},
    "resident": {"cost": RESIDENT, "max_in_flight": None, "stages_without_slot": True},
}

#: The name of the policy that only a simulator can have.
BELADY = "belady"


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for every policy and every number of slots.

    Attributes:
        host_entries, host_bytes: host memory, those in slots included; None: it holds everything.
        hold: how long leases last; None: they end, and loads complete, at once.
        nbytes: size of the adapters whose size the trace does not tell.
        cost: how long loads take.
        max_in_flight: loads at a time, or None for any number; stock vLLM does one.
        stages_without_slot: what is on disk is read before it takes a slot; stock vLLM cannot.
            Where loads take no time (no `hold`) it makes no difference, and is left out.
        drain_after_s: as in `CacheConfig`.
        belady: replay Belady's policy too, as the reference.  Reads the trace twice, and keeps
            four bytes a request.
    """

    host_entries: int | None = None
    host_bytes: int | None = None
    hold: Hold | None = None
    nbytes: int = TYPICAL_NBYTES
    cost: TransferCost = field(default_factory=TransferCost)
    max_in_flight: int | None = 1
    stages_without_slot: bool = False
    drain_after_s: float = DRAIN_AFTER_S
    belady: bool = True

    @classmethod
    def of_engine(cls, engine: str, **others: Any) -> Setup:
        """Loads as one of our engines does them.

        Args:
            engine: ``"stock"`` or ``"resident"``.
            others: attributes.

        Raises:
            ConfigError: there is no such engine.
        """
        if engine not in ENGINES:
            raise ConfigError(f"unknown engine {engine!r}: choose of {', '.join(ENGINES)}")
        return cls(**{**ENGINES[engine], **others})

    def limits(self, slots: int) -> Limits:
        """The planner's limits.

        Raises:
            ConfigError: there are no slots, or host memory holds fewer adapters than they do.
        """
        if slots < 1:
            raise ConfigError(f"there must be at least one slot, not {slots}")
        entries = sys.maxsize if self.host_entries is None else self.host_entries
        if entries < slots:
            raise ConfigError(
                f"host memory for {entries} adapters is too small for {slots} slots: what is in a "
                "slot is in host memory too"
            )
        return Limits(
            slots,
            entries,
            self.host_bytes,
            stages_without_slot=self.stages_without_slot and self.hold is not None,
            max_in_flight=self.max_in_flight,
            drain_after_s=self.drain_after_s,
        )

    def check(self, policy: PolicyLike, slots: int) -> None:
        """Raise `ConfigError` if `replay` would, before anything long has been begun."""
        self.limits(slots)
        if policy != BELADY:
            _make(policy)

    def replay(self, policy: PolicyLike, slots: int, uses: array[int] | None, trace: str) -> Replay:
        """Make a replay that nothing has been fed to.

        Args:
            uses: what `next_uses` says of the trace; only Belady's policy needs it.
            trace: its name, for messages.
        """
        future = None
        if policy == BELADY:
            assert uses is not None, "Belady's policy needs to know the future"
            future = Future(uses, trace)
        host: Policy = _NeverAsked()
        if self.host_entries is not None or self.host_bytes is not None:
            host = _make(policy, future)
        pair = (_make(policy, future), host)
        if self.hold is None:
            return InstantReplay(self.limits(slots), pair, self.cost, future)
        return HeldReplay(self.limits(slots), pair, self.cost, future, self.hold)


def _make(policy: PolicyLike, future: Future | None = None) -> Policy:
    if future is not None:
        return Belady(future.next_use)
    try:
        return make_policy(policy)
    except ConfigError as error:
        if isinstance(policy, str) and "unknown policy" in str(error):
            known = ", ".join([*policy_names(), BELADY])
            raise ConfigError(f"unknown policy {policy!r}: choose of {known}") from error
        raise


class _NeverAsked:
    """The policy of host memory without limit: nothing ever leaves it."""

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        pass

    def on_access(self, key: AdapterKey, now: float) -> None:
        pass

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        raise AssertionError("nothing leaves host memory without limit")

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        raise AssertionError("nothing leaves host memory without limit")
