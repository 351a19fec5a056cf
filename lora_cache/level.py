"""How scarce memory is, in three steps: what a sampler measures and a planner is told."""

from __future__ import annotations

from enum import IntEnum


class Level(IntEnum):
    """How scarce memory is; higher is scarcer."""

    NONE = 0
    SOFT = 1  #: stop what is optional: speculative loads
    HARD = 2  #: give something back

    @property
    def label(self) -> str:
        """As it is written in events and JSON."""
        return self.name.lower()
