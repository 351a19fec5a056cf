"""The packer, a real process, and the images that it keeps on disk."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_cache.engines.resident import jobs
from lora_cache.engines.resident.arena import Arena
from lora_cache.engines.resident.image_store import ImageStore
from lora_cache.engines.resident.jobs import Wanted
from lora_cache.engines.resident.layout import Contents
from lora_cache.engines.resident.making import SETTLED_AFTER_NS
from lora_cache.engines.resident.packing_line import PackingLine
from lora_cache.manifest import read_stamp
from tests.resident.layouts import plain_layout
from tests.resident.parts import write_adapter
from tests.resident.test_packing_line import LAYOUTS, here, run

pytest.importorskip("torch")

pytestmark = pytest.mark.long  # each starts a packer, which imports torch

ROOT = Path(__file__).parents[2]
COUNT = 6


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[Wanted]:
    """Adapters that have not changed for a while."""
    home = tmp_path_factory.mktemp("settled")
    paths = [write_adapter(home / f"a{n}", seed=n, rank=2 + n) for n in range(COUNT)]
    time.sleep(SETTLED_AFTER_NS / 1e9 + 0.1)
    return [Wanted(str(path), f"sha256:{path.name}", read_stamp(path)) for path in paths]


@dataclass
class Line:
    packing: PackingLine
    arena: Arena

    async def images(self, wanted: Wanted) -> list[bytes]:
        _, nbytes = await self.packing.examine(wanted)
        offsets = [self.arena.allocate(length) for length in nbytes]
        await self.packing.pack(wanted, offsets, nbytes)
        with mmap.mmap(self.arena.fd, self.arena.nbytes) as memory:
            found = [memory[o : o + n] for o, n in zip(offsets, nbytes, strict=True)]
        self.packing.free(offsets)
        await self.packing.emptied()
        return found

    async def saved(self) -> None:
        while self.packing.is_busy:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await self.packing.emptied()
        assert self.arena.used == 0
        self.arena.check()


@asynccontextmanager
async def line(images: Path, layouts: Any = LAYOUTS) -> AsyncIterator[Line]:
    arena = Arena(64 << 20)
    packing = PackingLine(arena, layouts, images, 1 << 30)
    try:
        yield Line(packing, arena)
    finally:
        await packing.close()
        arena.close()


def test_what_one_packer_has_packed_the_next_one_reads(
    wanted: list[Wanted], tmp_path: Path
) -> None:
    async def main() -> None:
        expected = [here(Path(each.directory)) for each in wanted]
        async with line(tmp_path) as first:
            for each, images in zip(wanted, expected, strict=True):
                assert await first.images(each) == images
                await first.saved()
            assert (first.packing.packed, first.packing.read) == (2 * COUNT, 0)
        assert len(os.listdir(tmp_path)) == 2 * COUNT
        async with line(tmp_path) as second:
            found = await asyncio.gather(*map(second.images, wanted))
            assert found == expected
            assert (second.packing.packed, second.packing.read) == (0, 2 * COUNT)

    run(main())


def test_an_image_in_memory_does_not_need_the_adapter_s_files(
    wanted: list[Wanted], tmp_path: Path
) -> None:
    """The key says what the content is; where it was packed from may be gone or another by now."""

    async def main() -> None:
        async with line(tmp_path) as first:
            await first.images(wanted[0])
            await first.saved()
        moved = Wanted(str(tmp_path / "gone"), wanted[0].key)
        async with line(tmp_path) as second:
            assert await second.images(moved) == here(Path(wanted[0].directory))

    run(main())


def test_other_layouts_do_not_share_images(wanted: list[Wanted], tmp_path: Path) -> None:
    async def main() -> None:
        for layouts in ([plain_layout()], [plain_layout(vllm_version="1")]):
            async with line(tmp_path, layouts) as packer:
                await packer.images(wanted[0])
                await packer.saved()
                assert packer.packing.packed == 1

    run(main())


def flip(directory: Path, at: int) -> None:
    for path in directory.iterdir():
        raw = bytearray(path.read_bytes())
        raw[at] ^= 0x10
        path.write_bytes(raw)


def test_a_damaged_image_is_packed_anew_and_replaced(wanted: list[Wanted], tmp_path: Path) -> None:
    expected = here(Path(wanted[0].directory))

    async def main() -> None:
        async with line(tmp_path) as first:
            await first.images(wanted[0])
            await first.saved()
            for at in (0, 5000, -20):
                flip(tmp_path, at)
                assert await first.images(wanted[0]) == expected
                await first.saved()
            assert (first.packing.packed, first.packing.read) == (2 + 3 * 2, 0)
            assert await first.images(wanted[0]) == expected
            assert first.packing.read == 2

    run(main())


def touch(path: Path) -> None:
    os.utime(path / "adapter_model.safetensors", (1, 1))


def write_in_place(path: Path) -> None:
    with open(path / "adapter_model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def replace(path: Path) -> None:
    write_adapter(path, seed=77)


def test_nothing_is_kept_of_files_that_have_changed(tmp_path: Path) -> None:
    """Between the moment when their key was found, and the one when they were packed."""
    paths = []
    for change in (touch, write_in_place, replace):
        path = write_adapter(tmp_path / change.__name__, seed=3)
        paths.append((path, read_stamp(path)))
        time.sleep(0.02)
        change(path)
    time.sleep(SETTLED_AFTER_NS / 1e9 + 0.1)

    async def main() -> None:
        async with line(tmp_path / "images") as packer:
            for path, stamp in paths:
                assert await packer.images(Wanted(str(path), "sha256:old", stamp)) == here(path)
                await packer.saved()

    run(main())
    assert not (tmp_path / "images").exists()


def test_nothing_is_kept_of_files_that_were_written_a_moment_ago(tmp_path: Path) -> None:
    async def main() -> None:
        path = write_adapter(tmp_path / "a", seed=3)
        async with line(tmp_path / "images") as packer:
            await packer.images(Wanted(str(write_adapter(tmp_path / "warm"))))
            # Ahead of the clock: packing it may take a while.
            os.utime(path / "adapter_config.json", (time.time() + 60,) * 2)
            each = Wanted(str(path), "sha256:new", read_stamp(path))
            assert await packer.images(each) == here(path)
            await packer.saved()
            assert not (tmp_path / "images").exists()

    run(main())


def test_a_directory_that_cannot_be_used_fails_no_load(wanted: list[Wanted]) -> None:
    async def main() -> None:
        async with line(Path("/proc/no/such/place")) as packer:
            assert await packer.images(wanted[0]) == here(Path(wanted[0].directory))
            await packer.saved()

    run(main())


def test_who_is_waited_for_comes_before_what_is_prefetched(wanted: list[Wanted]) -> None:
    async def main() -> None:
        async with line(Path("/proc/no/such/place")) as packer:
            await packer.images(Wanted(wanted[0].directory))
            assert packer.packing.pid is not None
            order: list[int] = []

            async def examine(number: int, urgent: bool) -> None:
                await packer.packing.examine(Wanted(wanted[1].directory, urgent=urgent))
                order.append(number)

            os.kill(packer.packing.pid, signal.SIGSTOP)
            tasks = [asyncio.create_task(examine(n, n == 39)) for n in range(40)]
            await asyncio.sleep(0.1)
            os.kill(packer.packing.pid, signal.SIGCONT)
            await asyncio.gather(*tasks)
            assert order.index(39) < 20

    run(main())


# ---------------------------------------------------------------------------- who uses the arena


def test_memory_that_is_still_used_is_free_only_when_it_is_not(wanted: list[Wanted]) -> None:
    async def main() -> None:
        async with line(Path("/nowhere"), [plain_layout()]) as packer:
            packing, arena = packer.packing, packer.arena
            packing._in_use.update({(one := arena.allocate(1)): 1, (two := arena.allocate(1)): 1})
            packing._in_use[three := arena.allocate(1)] = 2
            packing.free([one, three])
            packing._take(jobs.Packed(1, 0.0, saving=True))
            await packing.emptied()
            assert arena.used == 3 * mmap.PAGESIZE
            packing._take(jobs.Refused(2, "damaged", unknown=False))
            await packing.emptied()
            assert arena.used == 2 * mmap.PAGESIZE
            packing._take(jobs.Saved(1))
            await packing.emptied()
            assert arena.used == mmap.PAGESIZE
            packing.free([two])
            await packing.emptied()
            assert arena.used == 0
            assert not packing.is_busy

    run(main())


def test_a_cancelled_load_s_memory_is_not_given_to_another(wanted: list[Wanted]) -> None:
    """Its packer still writes there."""

    async def main() -> None:
        async with line(Path("/nowhere"), [plain_layout()]) as packer:
            packing, arena = packer.packing, packer.arena
            await packer.images(Wanted(wanted[0].directory))
            assert packing.pid is not None
            one = Wanted(wanted[1].directory)
            _, nbytes = await packing.examine(one)
            offset = arena.allocate(nbytes[0])
            os.kill(packing.pid, signal.SIGSTOP)
            load = asyncio.create_task(packing.pack(one, [offset], nbytes))
            await asyncio.sleep(0.02)
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            packing.free([offset])
            assert arena.allocate(nbytes[0]) != offset
            os.kill(packing.pid, signal.SIGCONT)
            while packing.is_busy:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await packing.emptied()
            assert arena.allocate(nbytes[0]) == offset

    run(main())


def test_a_killed_packer_uses_nothing(wanted: list[Wanted], tmp_path: Path) -> None:
    async def main() -> None:
        async with line(tmp_path) as packer:
            for each in wanted[:2]:
                await packer.images(each)  # it may be saving now
                assert packer.packing.pid is not None
                os.kill(packer.packing.pid, signal.SIGKILL)
                await packer.saved()
            for each in wanted:
                assert await packer.images(each) == here(Path(each.directory))
                await packer.saved()
        async with line(tmp_path) as last:
            for each in wanted:
                assert await last.images(each) == here(Path(each.directory))
            assert last.packing.packed == 0

    run(main())


# ---------------------------------------------------------------------------- several processes

DYING = """
import os, signal, sys
from pathlib import Path
from lora_cache.engines.resident import image_file
from lora_cache.engines.resident.image_store import ImageStore
from lora_cache.engines.resident.layout import Contents
real = image_file.write_exactly
def write_exactly(fd, data, offset):
    real(fd, memoryview(data)[:len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)
image_file.write_exactly = write_exactly
store = ImageStore(Path(sys.argv[1]), 1 << 30)
store.write("aa", "key", Contents(1, b""), memoryview(bytes(99999)))
"""

WRITING = """
import sys
from pathlib import Path
from lora_cache.engines.resident.image_store import ImageStore
from lora_cache.engines.resident.layout import Contents
store = ImageStore(Path(sys.argv[1]), 12_000_000)
data = {n: bytes([n]) * (3_000_000 - n) for n in range(4)}
print("ready", flush=True)
sys.stdin.readline()
written = read = 0
for turn in range(40):
    n = (turn * int(sys.argv[2]) + turn // 5) % 4
    found = store.find("aa", str(n))
    if found is None:
        written += store.write("aa", str(n), Contents(1, b""), memoryview(data[n]))
    else:
        out = bytearray(found.nbytes)
        found.fill(memoryview(out))
        found.close()
        assert out == data[n]
        read += 1
    if turn % 7 == 0:
        store._path("aa", str(n)).unlink(missing_ok=True)
assert not store.damaged
print(written, read)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_a_writer_that_is_killed_leaves_what_the_next_one_uses(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for _ in range(3):
        dying = start(DYING, str(images))
        assert dying.wait(240) == -signal.SIGKILL
        assert [path.suffix for path in images.iterdir()] == [".part"]
    store = ImageStore(images, 1 << 30)
    assert store.find("aa", "key") is None
    assert store.write("aa", "key", Contents(1, b""), memoryview(b"x" * 99_999))
    assert [path.suffix for path in images.iterdir()] == [".image"]
    found = store.find("aa", "key")
    assert found is not None
    out = bytearray(found.nbytes)
    found.fill(memoryview(out))
    found.close()
    assert out == b"x" * 99_999


def test_processes_that_write_the_same_images_at_once(tmp_path: Path) -> None:
    writers = [start(WRITING, str(tmp_path / "images"), str(step)) for step in (1, 1, 3)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    totals = [0, 0]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        out, _ = writer.communicate(timeout=240)
        assert writer.returncode == 0
        written, read = map(int, out.split())
        totals[0] += written
        totals[1] += read
    assert all(totals)
    assert not [path for path in (tmp_path / "images").iterdir() if path.suffix == ".part"]
