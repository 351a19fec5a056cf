"""Rooms of images: allocated, page-locked, used again, given back."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, cast

import pytest

from lora_cache.engines.resident import wire
from lora_cache.engines.resident.arena import Arena, ArenaFullError
from lora_cache.engines.resident.rooms import MOST_READY, Room, Rooms
from lora_cache.engines.resident.workers import WorkerError

PAGE = mmap.PAGESIZE
SMALL, LARGE = [PAGE], [2 * PAGE]


class FakeWorkers:
    """One worker; remembers what is locked."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.begun: set[int] = set()
        self.asked = 0
        self.failures = 0  # of the next calls

    async def command(self, make: Callable[[int, int], wire.ToAgent]) -> list[wire.Done]:
        await asyncio.sleep(0)
        message = make(1, 0)
        if isinstance(message, wire.PageLock):
            self.begun.add(message.offset)
        if self.failures:
            self.failures -= 1
            raise WorkerError("no")
        if isinstance(message, wire.PageLock):
            assert message.offset not in self.locked
            self.asked += 1
            self.locked[message.offset] = message.nbytes
        else:
            assert isinstance(message, wire.PageUnlock)
            for offset in message.offsets:
                self.begun.remove(offset)
                self.locked.pop(offset, None)  # as where locking has failed
        return [wire.Done(1, 0.0)]


class FakeLine:
    """A packer that is busy at some offsets."""

    def __init__(self, arena: Arena, workers: FakeWorkers) -> None:
        self.arena, self.workers = arena, workers
        self.busy: set[int] = set()
        self.populated = 0

    def is_using(self, offsets: Iterable[int]) -> bool:
        return bool(self.busy & set(offsets))

    async def populate(self, offsets: list[int], nbytes: list[int]) -> None:
        assert not self.workers.begun & set(offsets), "vLLM's process brings them in"
        await asyncio.sleep(0)
        self.populated += 1

    def free(self, offsets: Iterable[int]) -> None:
        for offset in offsets:
            assert offset not in self.workers.locked, "the GPU could still read it"
            self.arena.free(offset)

    async def emptied(self) -> bool:
        return False

    async def wait_for_room(self) -> bool:
        return False


class Rig:
    def __init__(self, pages: int = 6) -> None:
        self.arena = Arena(pages * PAGE)
        self.workers = FakeWorkers()
        self.line = FakeLine(self.arena, self.workers)
        self.rooms = Rooms(cast(Any, self.workers), self.arena, cast(Any, self.line))

    async def room(self, nbytes: list[int]) -> Room:
        room = await self.rooms.take(nbytes)
        await self.rooms.lock(room)
        return room

    def check(self, used: int) -> None:
        """`used` pages are taken, all of them locked."""
        self.arena.check()
        assert self.arena.used == used * PAGE
        assert sum(self.workers.locked.values()) == used * PAGE


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.arena.close()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def test_the_room_of_a_victim_is_used_again_as_it_is(rig: Rig) -> None:
    async def main() -> None:
        first = await rig.room(SMALL)
        await rig.rooms.leave(first, again=True)
        rig.check(1)
        second = await rig.room(SMALL)
        assert second.offsets == first.offsets
        assert (rig.workers.asked, rig.rooms.reused) == (1, 1)

    run(main())


def test_only_for_an_image_of_the_same_size(rig: Rig) -> None:
    async def main() -> None:
        await rig.rooms.leave(await rig.room(LARGE), again=True)
        await rig.room(SMALL)
        rig.check(3)
        assert rig.rooms.reused == 0

    run(main())


def test_not_while_the_packer_still_reads_there(rig: Rig) -> None:
    async def main() -> None:
        first = await rig.room(SMALL)
        rig.line.busy.update(first.offsets)  # keeps it on disk
        await rig.rooms.leave(first, again=True)
        assert (await rig.room(SMALL)).offsets != first.offsets
        rig.line.busy.clear()
        assert (await rig.room(SMALL)).offsets == first.offsets

    run(main())


def test_what_leaves_for_good_is_given_back(rig: Rig) -> None:
    async def main() -> None:
        await rig.rooms.leave(await rig.room(SMALL), again=False)
        rig.check(0)

    run(main())


def test_few_are_kept(rig: Rig) -> None:
    async def main() -> None:
        rooms = [await rig.room(SMALL) for _ in range(5)]
        for room in rooms:
            await rig.rooms.leave(room, again=True)
        await rig.rooms.close()
        rig.check(MOST_READY)
        assert (await rig.room(SMALL)).offsets == rooms[-MOST_READY].offsets

    run(main())


def test_a_newcomer_does_not_wait_until_the_surplus_is_given_back(rig: Rig) -> None:
    async def main() -> None:
        rooms = [await rig.room(SMALL) for _ in range(MOST_READY + 1)]
        for room in rooms:
            await rig.rooms.leave(room, again=True)
        rig.check(MOST_READY + 1)
        await rig.rooms.close()
        rig.check(MOST_READY)

    run(main())


def test_they_make_way_for_images_of_other_sizes(rig: Rig) -> None:
    async def main() -> None:
        await rig.room(LARGE)
        await rig.room(LARGE)
        for room in [await rig.room(SMALL) for _ in range(2)]:
            await rig.rooms.leave(room, again=True)
        await rig.room(LARGE)
        rig.check(6)
        with pytest.raises(ArenaFullError):
            await rig.room(SMALL)
        rig.check(6)

    run(main())


def test_one_is_made_ready_ahead(rig: Rig) -> None:
    async def main() -> None:
        await rig.room(LARGE)
        rig.rooms.prepare(SMALL)
        rig.rooms.prepare(SMALL)
        await rig.rooms.close()
        rig.check(3)
        rig.rooms.prepare(SMALL)  # there is one
        await rig.rooms.close()
        rig.check(3)
        await rig.room(SMALL)
        assert (rig.rooms.reused, rig.line.populated) == (1, 1)

    run(main())


def test_several_while_the_arena_has_plenty() -> None:
    async def main() -> None:
        rig = Rig(pages=20)
        rig.rooms.prepare(SMALL)
        await rig.rooms.close()
        rig.check(MOST_READY)
        rooms = [await rig.room(SMALL) for _ in range(MOST_READY)]
        assert (rig.rooms.reused, rig.workers.asked) == (MOST_READY, MOST_READY)
        for room in rooms[1:]:
            await rig.rooms.leave(room, again=True)
        rig.rooms.prepare(LARGE)  # others do not have to go for more than one
        await rig.rooms.close()
        rig.check(MOST_READY + 2)
        rig.arena.close()

    run(main())


def test_what_waits_and_what_is_made_ready_do_not_chase_each_other() -> None:
    async def main() -> None:
        for pages in range(2, 16):
            rig = Rig(pages)
            held = [await rig.room(SMALL) for _ in range(pages // 2)]
            for _ in range(20):  # each newcomer has a victim
                held.append(await rig.room(SMALL))
                rig.rooms.prepare(SMALL)
                await rig.rooms.leave(held.pop(0), again=True)
                await rig.rooms.close()
            assert rig.workers.asked <= pages, "made ready, and given back, again and again"
            rig.arena.check()
            rig.arena.close()

    run(main())


def test_one_that_is_being_made_ready_is_waited_for(rig: Rig) -> None:
    async def main() -> None:
        await rig.room(LARGE)
        rig.rooms.prepare(SMALL)
        await asyncio.sleep(0)  # it has begun
        one, two = await asyncio.gather(rig.room(SMALL), rig.room(SMALL))
        assert one.offsets != two.offsets
        assert (rig.workers.asked, rig.rooms.reused) == (3, 1)
        rig.check(4)

    run(main())


def test_none_is_made_ready_where_there_is_no_room(rig: Rig) -> None:
    async def main() -> None:
        for _ in range(3):
            await rig.room(LARGE)
        rig.rooms.prepare(SMALL)
        await rig.rooms.close()
        rig.check(6)

    run(main())


def test_scarce_memory(rig: Rig) -> None:
    async def main() -> None:
        held = await rig.room(SMALL)
        await rig.rooms.leave(await rig.room(SMALL), again=True)
        rig.rooms.conserve(True)
        await rig.rooms.close()
        rig.check(1)
        rig.rooms.prepare(SMALL)
        await rig.rooms.close()
        await rig.rooms.leave(held, again=True)
        rig.check(0)
        rig.rooms.conserve(False)
        await rig.rooms.leave(await rig.room(SMALL), again=True)
        rig.check(1)

    run(main())


def test_a_worker_that_fails_to_lock(rig: Rig) -> None:
    async def main() -> None:
        room = await rig.rooms.take(SMALL)
        rig.workers.failures = 1
        with pytest.raises(WorkerError):
            await rig.rooms.lock(room)
        assert room.is_locked, "it may have been locked, and must be unlocked"
        await rig.rooms.leave(room, again=False)
        rig.check(0)

    run(main())


def test_one_who_needs_room_waits_for_what_is_being_given_back(rig: Rig) -> None:
    async def main() -> None:
        for _ in range(2):
            await rig.room(LARGE)
        await rig.rooms.leave(await rig.room(LARGE), again=True)
        rooms = await asyncio.gather(rig.room(SMALL), rig.room(SMALL))
        assert rooms[0].offsets != rooms[1].offsets
        rig.check(6)

    run(main())


def test_no_load_fails_for_want_of_what_is_made_ready_ahead(rig: Rig) -> None:
    async def main() -> None:
        for _ in range(2):
            await rig.room(LARGE)
        rig.rooms.prepare(SMALL)
        await asyncio.sleep(0)  # it has begun
        await rig.room(LARGE)
        rig.check(6)

    run(main())


def test_a_room_that_could_not_be_made_ready_is_given_back(rig: Rig) -> None:
    async def main() -> None:
        rig.workers.failures = 1
        rig.rooms.prepare(SMALL)
        await rig.rooms.close()
        rig.check(0)

    run(main())
