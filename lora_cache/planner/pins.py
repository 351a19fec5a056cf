"""Pins: an operator's standing requests, and how many of them there may be."""

from __future__ import annotations

from lora_cache.errors import PinnedError
from lora_cache.key import AdapterKey
from lora_cache.planner.actions import Limits, Want
from lora_cache.planner.waiting import Ticket
from lora_cache.state import Tier

_PINNING = (Want.PIN_GPU, Want.PIN_HOST)


class Pins:
    """Established pins by tier, and announced ones that wait for their copy.

    An announced pin counts against the limits, so that two callers cannot both take the last
    place, but protects nothing until its copy is ready.  One slot and one host entry always stay
    unpinned: without them no other adapter could ever come in.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.gpu: set[AdapterKey] = set()
        self.host: set[AdapterKey] = set()
        self._announced: dict[int, Ticket] = {}

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self.gpu or key in self.host

    def tier_of(self, key: AdapterKey) -> Tier | None:
        """The tier nearest to the GPU that `key` is pinned in."""
        if key in self.gpu:
            return Tier.GPU
        return Tier.HOST if key in self.host else None

    def refusal(self, key: AdapterKey, want: Want) -> PinnedError | None:
        """Why one more pin cannot be had, if it cannot (None for wants that pin nothing)."""
        if want not in _PINNING:
            return None
        wanted = self._announced.values()
        gpu = self.gpu | {t.key for t in wanted if t.want is Want.PIN_GPU}
        everywhere = gpu | self.host | {t.key for t in wanted} | {key}
        if want is Want.PIN_GPU and len(gpu | {key}) > self._limits.slots - 1:
            return PinnedError(
                f"cannot pin {key}: {len(gpu)} of {self._limits.slots} slots are pinned and one "
                "must stay free for the others; unpin one, or raise max_loras",
                key=key,
                tier=Tier.GPU,
            )
        if len(everywhere) > self._limits.host_entries - 1:
            return PinnedError(
                f"cannot pin {key}: {len(everywhere) - 1} of {self._limits.host_entries} host "
                "entries are pinned and one must stay free; unpin one, or raise max_cpu_loras",
                key=key,
                tier=Tier.HOST,
            )
        return None

    def announce(self, ticket: Ticket) -> None:
        """Count the pin that this ticket wants (other tickets are ignored)."""
        if ticket.want in _PINNING:
            self._announced[ticket.number] = ticket

    def withdraw(self, ticket: int) -> None:
        self._announced.pop(ticket, None)

    def establish(self, ticket: int) -> None:
        """The copy that this ticket wanted pinned is ready (other tickets are ignored)."""
        if request := self._announced.pop(ticket, None):
            (self.gpu if request.want is Want.PIN_GPU else self.host).add(request.key)

    def remove(self, key: AdapterKey) -> None:
        self.gpu.discard(key)
        self.host.discard(key)
