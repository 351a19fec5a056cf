"""The driver, with a planner that says what a test tells it to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lora_cache import AdapterKey, Tier
from lora_cache.driver import Driver
from lora_cache.errors import LeaseTimeoutError
from lora_cache.events import Events
from lora_cache.planner import Granted, Want
from lora_cache.testing import FakeEngine


class ScriptedPlanner:
    """The second ticket's question brings the first one's grant, as when a drain is lifted."""

    awaits_tick = False
    in_flight = 0
    limits = SimpleNamespace(slots=1)
    residency = SimpleNamespace(leases={}, pins=SimpleNamespace(gpu=set()))

    def acquire(self, ticket: int, *_: object) -> list[Granted]:
        return [Granted(1, Tier.GPU)] if ticket == 2 else []

    def cancel(self, ticket: int, now: float) -> list[Granted]:
        return []


class Named:
    """As much of an adapter as the driver looks at before it is loaded."""

    path = Path("/nowhere")

    def __init__(self, name: str) -> None:
        self.key = AdapterKey(name)
        self.nbytes = 1


def test_a_grant_is_for_the_ticket_that_it_names() -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.begin_use = lambda key: None  # type: ignore[method-assign]
        planner = cast(Any, ScriptedPlanner())
        driver = Driver(planner, engine, cast(Any, None), lambda _: None, Events(), None)
        await driver.open()
        first = asyncio.create_task(driver.acquire(cast(Any, Named("a")), Want.LEASE, None))
        await asyncio.sleep(0)
        with pytest.raises(LeaseTimeoutError):
            await driver.acquire(cast(Any, Named("b")), Want.LEASE, 0.01)
        assert await asyncio.wait_for(first, 1) == (1, Tier.GPU)

    asyncio.run(main())
