"""A few at a time, and those that a lease waits for before the others."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from lora_cache.store.disk import Interest
from lora_cache.store.pool import Urgency

# Ordered: the first of a dict is found in time that grows with what has left it.
_Waiting = OrderedDict[asyncio.Future[None], Interest]


class Turns:
    """Lets `count` work at a time.  One event loop.

    A lease does not queue behind speculation, however much there is of it: it goes first, and some
    turns are never given to what nobody waits for.  Otherwise who came first goes first.

    Args:
        count: how many.
        speculative: how many of those may be speculation.
    """

    def __init__(self, count: int, speculative: int) -> None:
        self._count = count
        self._speculative = speculative
        self._waiting: dict[Urgency, _Waiting] = {urgency: _Waiting() for urgency in Urgency}
        self._working: list[Interest] = []

    @asynccontextmanager
    async def taken(self, interest: Interest) -> AsyncIterator[None]:
        """Wait for a turn, and have it for the length of the block.

        A wait that is cancelled takes no turn.
        """
        granted = asyncio.get_running_loop().create_future()
        self._waiting[interest.urgency][granted] = interest
        interest.attach(partial(self._hurry, granted))
        self._grant()
        try:
            await granted
            yield
        finally:
            if not any(waiting.pop(granted, None) for waiting in self._waiting.values()):
                self._working.remove(interest)
                self._grant()

    def _hurry(self, granted: asyncio.Future[None]) -> None:
        """A lease waits for it now."""
        interest = self._waiting[Urgency.SPECULATION].pop(granted, None)
        if interest is not None:
            self._waiting[Urgency.LEASE][granted] = interest
        self._grant()

    def _grant(self) -> None:
        for urgency in sorted(Urgency):
            waiting = self._waiting[urgency]
            while waiting and self._is_free(urgency):
                granted = next(iter(waiting))
                self._working.append(waiting.pop(granted))
                if not granted.done():  # it may have been cancelled just now
                    granted.set_result(None)

    def _is_free(self, urgency: Urgency) -> bool:
        if len(self._working) >= self._count:
            return False
        speculative = sum(interest.urgency is Urgency.SPECULATION for interest in self._working)
        return urgency is Urgency.LEASE or speculative < self._speculative
