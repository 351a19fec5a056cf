"""Pressure levels: a signal that jitters becomes a level that does not.

Pure: no clock, no I/O.  Each level is a latch.  It is set as soon as the signal reaches the level's
mark, and released when the signal has stayed below the mark by more than the band, without a break,
for the dwell time.  From that follows what the tests prove: a level changes once unless the signal
crosses the whole band, it lasts at least the dwell time, and more pressure never means a lower
level.  It rises at once and falls late: what must react to memory running out cannot wait, what may
grow again can.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_cache.errors import ConfigError
from lora_cache.level import Level


@dataclass(frozen=True, slots=True)
class Marks:
    """When levels begin and end.

    Attributes:
        soft, hard: share of memory in use, 0 to 1, at which the level begins.
        band: how far below its mark the share must fall before a level can end.
        dwell_s: how long it must stay there, in seconds.

    Raises:
        ConfigError: the marks are not in order.
    """

    soft: float = 0.90
    hard: float = 0.97
    band: float = 0.03
    dwell_s: float = 10.0

    def __post_init__(self) -> None:
        if not (0 < self.band <= self.soft < self.hard <= 1 and self.dwell_s >= 0):
            raise ConfigError(
                f"pressure marks must be in order: 0 < band ({self.band}) ≤ soft ({self.soft}) < "
                f"hard ({self.hard}) ≤ 1, and dwell_s ({self.dwell_s}) not negative"
            )


HOST_MARKS = Marks()
#: Late, because vLLM takes its share of a GPU at once and keeps it.
GPU_MARKS = Marks(soft=0.98, hard=0.995, band=0.01)


@dataclass(frozen=True, slots=True)
class PressureEvent:
    """A level has changed.

    Attributes:
        at_s: when, on the sampler's clock.
        resource: ``"host"``, or the UUID of a GPU.
        before, after: the levels.
        share: of memory in use, which made it change.
    """

    at_s: float
    resource: str
    before: Level
    after: Level
    share: float

    def __str__(self) -> str:
        return (
            f"{self.resource}: {self.share:.1%} of memory is in use, pressure was "
            f"{self.before.label}, now {self.after.label}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``."""
        return {
            "at_s": self.at_s,
            "resource": self.resource,
            "before": self.before.label,
            "after": self.after.label,
            "share": round(self.share, 4),
        }


@dataclass(slots=True)
class _Latch:
    """One level."""

    mark: float
    is_set: bool = False
    below_since: float | None = None

    def update(self, share: float | None, now: float, marks: Marks) -> None:
        if share is None:  # nobody knows whether it stayed below
            self.below_since = None
        elif share >= self.mark:
            self.is_set, self.below_since = True, None
        elif share >= self.mark - marks.band:
            self.below_since = None
        else:
            if self.below_since is None:
                self.below_since = now
            if now - self.below_since >= marks.dwell_s:
                self.is_set = False


@dataclass(slots=True)
class Pressure:
    """The level of one resource.

    Attributes:
        resource: its name, for events.
        level: the present one.
    """

    resource: str
    marks: Marks = field(default_factory=Marks)
    level: Level = Level.NONE
    _latches: tuple[_Latch, _Latch] = field(init=False)

    def __post_init__(self) -> None:
        self._latches = (_Latch(self.marks.soft), _Latch(self.marks.hard))

    def update(self, share: float | None, now: float) -> PressureEvent | None:
        """Take note of a sample.

        Args:
            share: of memory in use, 0 to 1; None if it is not known, which changes no level.
            now: seconds; never goes back.

        Returns:
            what has changed, or None.
        """
        for latch in self._latches:
            latch.update(share, now, self.marks)
        before, self.level = self.level, Level(sum(latch.is_set for latch in self._latches))
        if share is None or before is self.level:
            return None
        return PressureEvent(now, self.resource, before, self.level, share)
