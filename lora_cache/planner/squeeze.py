"""What scarce memory changes: nothing optional is begun, and host memory gives back what is idle.

| pressure | on the host | on a GPU |
| --- | --- | --- |
| soft | no speculation, no new pins | no speculation, no new pins into slots |
| hard | and the host budget is halved, again and again | the same: beside slots nothing is held |

The budget is halved at once when pressure on the host becomes hard, and then every `shrink_every_s`
seconds while it stays hard and anything idle is left; never sooner, however levels come and go.  It
is back at once when that pressure is over, not when it is merely soft: between lies the whole way
from the hard mark to below the soft one, so giving back and filling up again cannot chase each
other.  A budget that is back costs nothing; memory fills only as requests come.

What is leased, pinned, in a slot or moving counts against the budget and never leaves for it.  A
load that somebody waits for takes what victims there are, and comes in even if those do not
suffice: so there is always room for one load a slot, however small the budget.
"""

from __future__ import annotations

from lora_cache.errors import MemoryPressureError
from lora_cache.key import AdapterKey
from lora_cache.level import Level
from lora_cache.planner.actions import Resized, Want
from lora_cache.planner.residency import Residency
from lora_cache.state import Tier

_NONE, _HARD = Level.NONE, Level.HARD


class Squeeze:
    """The levels that the planner was told of, and what follows from them.

    Args:
        every_s: seconds between two halvings of the host budget, at least.

    Attributes:
        host, gpu: the present levels; of several GPUs the highest.
        active: there may be something to do; asked after every event.
    """

    def __init__(self, residency: Residency, every_s: float) -> None:
        self._residency = residency
        self._every_s = every_s
        self.host = self.gpu = _NONE
        self.active = False
        self._shrinks_at = float("-inf")  # not before
        self._gives_back_at = float("-inf")  # likewise, after the engine has failed to

    # ------------------------------------------------------------------ what is not begun

    @property
    def speculates(self) -> bool:
        """What nobody waits for may be loaded."""
        return self.host is _NONE and self.gpu is _NONE

    def no_speculation(self, key: AdapterKey) -> MemoryPressureError:
        """What somebody who only wanted to stage `key` is told."""
        return MemoryPressureError(
            f"{self._words()}: {key} stays on disk until that is over, or a request needs it",
            key=key,
            tier=Tier.HOST,
        )

    def pin_refusal(self, key: AdapterKey, want: Want) -> MemoryPressureError | None:
        """Why one more pin cannot be had now, if it cannot; pins that exist are no new ones."""
        pins, to_slot = self._residency.pins, want is Want.PIN_GPU
        if not (to_slot or want is Want.PIN_HOST) or key in (pins.gpu if to_slot else pins):
            return None
        if self.host is _NONE and not (to_slot and self.gpu):
            return None
        return MemoryPressureError(
            f"{self._words()}: {key} cannot be pinned until that is over",
            key=key,
            tier=want.tier,
        )

    def _words(self) -> str:
        scarce = [
            f"{where} memory ({level.label} pressure)"
            for where, level in (("host", self.host), ("GPU", self.gpu))
            if level
        ]
        return f"{' and '.join(scarce)} is scarce"

    # ------------------------------------------------------------------ what is given back

    def press(self, host: Level, gpu: Level) -> None:
        """These are the levels now."""
        self.host, self.gpu = host, gpu
        self.active = True

    def advance(self, now: float) -> Resized | None:
        """Change the host budget, if it is time to; says what has changed."""
        table = self._residency.host
        before = table.target
        if self.host is _NONE:
            table.target = None
        elif self.host is _HARD and now >= self._shrinks_at:
            held = table.used_bytes if before is None else min(before, table.used_bytes)
            idle = next(self._residency.order_of_leaving(Tier.HOST, now), None)
            table.target = held if idle is None else held // 2
            self._shrinks_at = now + self._every_s
        self.active = self.host is _HARD or table.target is not None
        return None if table.target == before else Resized(before, table.target)

    def surplus(self, now: float) -> list[AdapterKey]:
        """Who must leave host memory now, in the policy's order."""
        return [] if now < self._gives_back_at else self._residency.surplus(now)

    def failed(self, now: float, retry_s: float) -> None:
        """The engine did not drop what it should: try again in `retry_s`."""
        self._gives_back_at = now + retry_s

    def deadline(self, now: float) -> float | None:
        """When `advance` or `surplus` will have something new to say."""
        due = [self._shrinks_at] if self.host is _HARD else []
        if self.active and self._gives_back_at > now:
            due.append(self._gives_back_at)
        return min(due, default=None)
