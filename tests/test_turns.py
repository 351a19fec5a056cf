"""Turns: few at a time, leases first, nobody lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.store.disk import Interest
from lora_cache.store.pool import Urgency
from lora_cache.turns import Turns

LEASE, SPECULATION = Urgency.LEASE, Urgency.SPECULATION


class Crowd:
    """Callers of `Turns`, each working until it is told to end."""

    def __init__(self, count: int, speculative: int) -> None:
        self.count, self.speculative = count, speculative
        self.turns = Turns(count, speculative)
        self.interests: list[Interest] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.ends: list[asyncio.Event] = []
        self.working: list[int] = []  # who got a turn, in this order
        self.order: list[int] = []

    async def add(self, urgency: Urgency) -> int:
        number = len(self.tasks)
        self.interests.append(Interest(urgency))
        self.ends.append(asyncio.Event())
        self.tasks.append(asyncio.create_task(self._work(number)))
        await settle()
        return number

    async def _work(self, number: int) -> None:
        async with self.turns.taken(self.interests[number]):
            self.working.append(number)
            self.order.append(number)
            try:
                await self.ends[number].wait()
            finally:
                self.working.remove(number)

    async def end(self, number: int) -> None:
        self.ends[number].set()
        await settle()

    async def cancel(self, number: int) -> None:
        self.tasks[number].cancel()
        await settle()

    async def hurry(self, number: int) -> None:
        self.interests[number].hurry()
        await settle()

    def waiting(self, urgency: Urgency) -> list[int]:
        return [
            number
            for number, task in enumerate(self.tasks)
            if not task.done()
            and number not in self.working
            and self.interests[number].urgency is urgency
        ]

    def check(self) -> None:
        """Nobody too many, and nobody waits who might work."""
        speculative = sum(self.interests[n].urgency is SPECULATION for n in self.working)
        assert len(self.working) <= self.count
        assert speculative <= self.speculative
        if len(self.working) < self.count:
            assert not self.waiting(LEASE)
            assert not self.waiting(SPECULATION) or speculative == self.speculative


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("count", "speculative"), [(1, 1), (2, 1), (16, 4)])
def test_a_lease_does_not_queue_behind_speculation(count: int, speculative: int) -> None:
    async def main() -> None:
        crowd = Crowd(count, speculative)
        for _ in range(100):
            await crowd.add(SPECULATION)
        assert len(crowd.working) == speculative
        lease = await crowd.add(LEASE)
        if count == 1:
            assert lease not in crowd.working
            await crowd.end(crowd.working[0])
        assert lease in crowd.working
        for number in range(len(crowd.tasks)):
            await crowd.end(number)
        await asyncio.gather(*crowd.tasks)
        assert sorted(crowd.order) == list(range(101))
        assert [n for n in crowd.order if n != lease] == list(range(100))

    asyncio.run(main())


def test_speculation_that_somebody_comes_to_wait_for_goes_first() -> None:
    async def main() -> None:
        crowd = Crowd(3, 2)
        for _ in range(5):
            await crowd.add(SPECULATION)
        assert crowd.working == [0, 1]
        await crowd.hurry(4)
        assert crowd.working == [0, 1, 4]
        await crowd.hurry(0)  # that works already: it is no speculation any more
        await crowd.end(4)
        assert crowd.working == [0, 1, 2]
        for task in crowd.tasks:
            task.cancel()

    asyncio.run(main())


def test_one_who_is_cancelled_the_moment_it_is_granted_gives_its_turn_on() -> None:
    async def main() -> None:
        crowd = Crowd(1, 1)
        for _ in range(3):
            await crowd.add(LEASE)
        crowd.ends[0].set()
        await asyncio.sleep(0)
        crowd.tasks[1].cancel()
        await settle()
        assert crowd.working == [2]
        await crowd.end(2)
        await crowd.add(LEASE)
        assert crowd.working == [3]
        await crowd.end(3)

    asyncio.run(main())


STEPS = st.lists(
    st.tuples(st.sampled_from(["lease", "speculation", "hurry", "end", "cancel"]), st.integers(0)),
    max_size=60,
)


@given(count=st.integers(1, 4), kept=st.integers(0, 3), steps=STEPS)
def test_any_order_of_events(count: int, kept: int, steps: Sequence[tuple[str, int]]) -> None:
    async def main() -> None:
        crowd = Crowd(count, max(1, count - kept))
        for what, which in steps:
            if what in ("lease", "speculation"):
                await crowd.add(LEASE if what == "lease" else SPECULATION)
            elif alive := [n for n, task in enumerate(crowd.tasks) if not task.done()]:
                pool = crowd.working if what == "end" else alive
                if pool:
                    await getattr(crowd, what)(pool[which % len(pool)])
            crowd.check()
        while crowd.working:
            await crowd.end(crowd.working[0])
            crowd.check()
        assert all(task.done() for task in crowd.tasks)

    asyncio.run(main())
