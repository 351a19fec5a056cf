"""What a cache tells whoever listens: who lost a place, to whom and why; and how memory fares."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lora_cache.key import AdapterKey
from lora_cache.memory import PressureEvent
from lora_cache.planner import Choice
from lora_cache.state import Tier

logger = logging.getLogger(__name__)

_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Eviction:
    """A copy has lost its place: to another adapter, or because memory is scarce.

    Attributes:
        at_s: when it had gone, on the cache's clock.
        tier: where it had its place; who leaves a slot is still in host memory, unless a second
            event says that it left that, too.
        victim, newcomer: who left, and for whom; for None, if host memory had to be given back.
        reason: the policy's words for why the victim was first, when it was chosen.
        runner_up: who would have been next; None if nobody else could have left.
        runner_up_reason: the policy's words for that one, or "".
    """

    at_s: float
    tier: Tier
    victim: AdapterKey
    newcomer: AdapterKey | None
    reason: str
    runner_up: AdapterKey | None
    runner_up_reason: str

    @classmethod
    def of(cls, choice: Choice, newcomer: AdapterKey | None, at_s: float) -> Eviction:
        return cls(at_s, newcomer=newcomer, **choice._asdict())

    def __str__(self) -> str:
        place = "its slot" if self.tier is Tier.GPU else "host memory"
        cause = f"for {self.newcomer}" if self.newcomer else "because memory is scarce"
        text = f"{self.victim} left {place} {cause}: {self.reason}"
        if self.runner_up is None:
            return f"{text}; nobody else could leave"
        return f"{text}; next would have been {self.runner_up}: {self.runner_up_reason}"

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``; adapters by digest and by name."""
        return {
            "at_s": self.at_s,
            "tier": self.tier,
            "victim": self.victim.digest,
            "victim_name": self.victim.name,
            "newcomer": self.newcomer.digest if self.newcomer else None,
            "newcomer_name": self.newcomer.name if self.newcomer else None,
            "reason": self.reason,
            "runner_up": self.runner_up.digest if self.runner_up else None,
            "runner_up_name": self.runner_up.name if self.runner_up else None,
            "runner_up_reason": self.runner_up_reason,
        }


@dataclass(frozen=True, slots=True)
class BudgetEvent:
    """What host memory may hold has changed, because memory became scarce or is so no longer.

    Attributes:
        at_s: when, on the cache's clock.
        before, after: in bytes; None: what is configured.  Adapters that are leased, pinned or in
            a slot stay, even if they alone are more.
    """

    at_s: float
    before: int | None
    after: int | None

    def __str__(self) -> str:
        before, after = (
            "what is configured" if n is None else f"{n} bytes" for n in (self.before, self.after)
        )
        return f"the budget of host memory was {before}, now it is {after}"

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``."""
        return asdict(self)


MemoryEvent = PressureEvent | BudgetEvent
Event = Eviction | MemoryEvent
Listener = Callable[[Event], None]


class Events:
    """Passes events on, and remembers the last ones."""

    def __init__(self) -> None:
        self._recent: deque[Eviction] = deque(maxlen=_REMEMBERED)
        self._of_memory: deque[MemoryEvent] = deque(maxlen=_REMEMBERED)
        self._listeners: list[Listener] = []

    @property
    def recent(self) -> tuple[Eviction, ...]:
        """The last evictions, newest first."""
        return tuple(reversed(self._recent))

    @property
    def of_memory(self) -> tuple[MemoryEvent, ...]:
        """The last ones of memory, newest first."""
        return tuple(reversed(self._of_memory))

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` called with each event; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def publish(self, event: Event) -> None:
        """Tell everybody.  A listener that fails is logged, and disturbs nobody."""
        if isinstance(event, Eviction):
            self._recent.append(event)
        else:
            self._of_memory.append(event)
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:
                logger.exception("a listener failed at: %s", event)
