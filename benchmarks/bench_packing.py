"""How long until an adapter on disk is an image in host memory?

    python -m benchmarks.bench_packing [--ranks 8 16 64] [--adapters 5] [--json FILE]

Adapters of all linear layers of Llama-3.1-8B in bfloat16, random, in the page cache; the packer is
the real one, a process of its own.

* resolve: what comes before: the manifest, the header, a digest of every byte;
* packed first: examined and packed;
* four at once: the same, by adapter;
* kept: the image was packed before, and is read from disk, every byte checked against its sum;
* read, 1 and N threads: the floor: the image's bytes, read into memory, and nothing else.

Each into fresh memory, whose pages come one by one as they are touched, and into memory that was
used before.  What was kept also into memory that another process has used (*another's*), and into
such that the packer was told of before (*told*).  Medians over the adapters.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import write_raw
from benchmarks.shapes import slot_layout, write_adapters
from lora_cache.adapter import Adapter, AdapterRef
from lora_cache.engines.resident.arena import Arena
from lora_cache.engines.resident.hands import Hands
from lora_cache.engines.resident.jobs import Wanted
from lora_cache.engines.resident.packing_line import PackingLine
from lora_cache.exact_io import read_exactly
from lora_cache.sources.local import LocalSource

MODULE = "benchmarks.bench_packing"
AT_ONCE = 4
CHUNK_BYTES = 1 << 20
LAYOUT = slot_layout()

Row = dict[str, Any]
Times = dict[str, list[float]]  # by what was done, into which memory; milliseconds


class Bench:
    """One packer, and its arena."""

    def __init__(self, line: PackingLine, arena: Arena) -> None:
        self.line = line
        self.arena = arena

    async def image(self, adapter: Adapter, keep: bool, offset: int | None = None) -> int:
        """Have its image in the arena, in fresh memory if no offset is given; returns where."""
        key = adapter.key.digest if keep else ""
        wanted = Wanted(str(adapter.path), key, adapter.stamp)
        _, sizes = await self.line.examine(wanted)
        if offset is None:
            offset = self.arena.allocate(sizes[0])
        await self.line.pack(wanted, [offset], sizes)
        return offset

    async def timed(self, times: Times, what: str, adapter: Adapter, keep: bool) -> None:
        """Into fresh memory, then into the same again."""
        started = time.perf_counter()
        offset = await self.image(adapter, keep)
        times[f"{what}, fresh"].append(ms_since(started))
        started = time.perf_counter()
        await self.image(adapter, keep, offset)
        times[f"{what}, used"].append(ms_since(started))
        self.line.free([offset])

    async def into_anothers(
        self, times: Times, adapter: Adapter, other: mmap.mmap, *, told: bool
    ) -> None:
        """Into pages that are there, but that the packer has never touched."""
        size = LAYOUT.max_nbytes(adapter.manifest.rank)
        offset = self.arena.allocate(size)
        for page in range(offset, offset + size, mmap.PAGESIZE):
            other[page] = 1
        if told:
            await self.line.populate([offset], [size])
        started = time.perf_counter()
        await self.image(adapter, True, offset)
        times["kept, told" if told else "kept, another's"].append(ms_since(started))
        self.line.free([offset])
        await self.line.emptied()  # and nobody has it mapped any more


@asynccontextmanager
async def bench(nbytes: int, images: Path | None = None) -> AsyncIterator[Bench]:
    """A new packer, with torch in it: that is loaded once, and not what is measured here."""
    arena = Arena(nbytes)
    line = PackingLine(arena, [LAYOUT], images, 1 << 40)
    with tempfile.TemporaryDirectory() as warm:
        made = Bench(line, arena)
        adapter = LocalSource().resolve(AdapterRef.local(write_adapters(Path(warm), 1, 1)[0]))
        line.free([await made.image(adapter, keep=False)])
    try:
        yield made
    finally:
        while line.is_busy:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await line.close()
        arena.close()


def ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3


async def measure(paths: list[Path], images: Path) -> Times:
    times: Times = defaultdict(list)
    adapters = []
    for path in paths:
        started = time.perf_counter()
        adapters.append(LocalSource().resolve(AdapterRef.local(path)))
        times["resolve"].append(ms_since(started))
    room = (2 * adapters[0].nbytes + (1 << 20)) * AT_ONCE
    async with bench(room) as packer:
        for adapter in adapters:
            await packer.timed(times, "packed first", adapter, keep=False)
        for first in range(len(adapters)):
            several = (adapters * (1 + AT_ONCE))[first : first + AT_ONCE]
            started = time.perf_counter()
            offsets = await asyncio.gather(*(packer.image(a, keep=False) for a in several))
            times["four at once, fresh"].append(ms_since(started) / AT_ONCE)
            packer.line.free(offsets)
    async with bench(room, images) as packer:
        for adapter in adapters:
            packer.line.free([await packer.image(adapter, keep=True)])
            while packer.line.is_busy:  # noqa: ASYNC110 - so that every image is kept
                await asyncio.sleep(0.01)
    async with bench(room, images) as packer:
        for adapter in adapters:
            await packer.timed(times, "kept", adapter, keep=True)
        with mmap.mmap(packer.arena.fd, packer.arena.nbytes) as other:
            for adapter in adapters:
                await packer.into_anothers(times, adapter, other, told=False)
                await packer.into_anothers(times, adapter, other, told=True)
        if packer.line.packed != 1:  # the one that warmed it
            raise RuntimeError("an image was not kept")
    return times


def floor(images: Path, times: Times, threads: int) -> None:
    """Plain reads of the same bytes, into memory as the arena's."""
    for path in images.iterdir():
        nbytes = path.stat().st_size
        fd, memory = os.open(path, os.O_RDONLY), os.memfd_create("floor")
        os.ftruncate(memory, nbytes)
        with mmap.mmap(memory, nbytes) as mapped, memoryview(mapped) as view:

            def read(start: int, fd: int = fd, view: memoryview = view) -> None:
                read_exactly(fd, view[start : start + CHUNK_BYTES], start)

            for count, turn in ((1, "fresh"), (1, "used"), (threads, "used")):
                timed(times, f"read, {count} threads, {turn}", read, nbytes, count)
        os.close(fd)
        os.close(memory)


def timed(times: Times, what: str, read: Callable[[int], None], nbytes: int, threads: int) -> None:
    hands = Hands(threads)
    hands.do(lambda _: time.sleep(0.001), range(threads))  # they are there
    started = time.perf_counter()
    hands.do(read, range(0, nbytes, CHUNK_BYTES))
    times[what].append(ms_since(started))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--adapters", type=int, default=5, help="of each rank")
    parser.add_argument("--threads", type=int, default=Hands().count, help="of the floor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where adapters and images are written")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    for rank in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            root, images = Path(work), Path(work) / "images"
            paths = write_adapters(root / "adapters", options.adapters, rank, options.seed)
            nbytes = (paths[0] / "adapter_model.safetensors").stat().st_size
            time.sleep(2.5)  # of what was written a moment ago nothing is kept
            times = asyncio.run(measure(paths, images))
            floor(images, times, options.threads)
        for what, taken in times.items():
            median = statistics.median(taken)
            rows.append(
                {
                    "rank": rank,
                    "bytes": nbytes,
                    "what": what,
                    "ms": [round(value, 2) for value in taken],
                    "median_ms": round(median, 2),
                    "gb_per_s": round(nbytes / median / 1e6, 2),
                }
            )
    table = Table(title="from disk (page cache) to host memory")
    for column in ("rank", "MB", "what", "median ms", "GB/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(
            str(row["rank"]),
            f"{row['bytes'] / 1e6:.0f}",
            row["what"],
            f"{row['median_ms']:.1f}",
            f"{row['gb_per_s']:.1f}",
        )
    Console().print(table)
    if options.json:
        packages = ("torch", "safetensors", "xxhash")
        write_raw(options.json, MODULE, packages, seed=options.seed, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
