"""The packer process: reads adapters and writes their images into the arena.

    python -m lora_cache.engines.resident.packer ARENA_FD ARENA_BYTES

A process of its own, so that it shares no interpreter lock with the step loop.  It takes jobs on
standard input, one after the other, and ends with it: whoever started it may die in any way.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lora_cache.engines.resident import jobs
from lora_cache.engines.resident.layout import Layout
from lora_cache.errors import CannotPackError, LoraCacheError


def answers(source: BinaryIO, arena: memoryview) -> Iterator[jobs.Answer]:
    """Carry out the jobs that come from `source`, until it ends."""
    layouts: list[Layout] = []
    while job := jobs.read(source, jobs.JOBS):
        if isinstance(job, jobs.Layouts):
            layouts = job.layouts
            continue
        try:
            yield _carry_out(job, layouts, arena)
        except CannotPackError as error:
            yield jobs.Refused(job.job, str(error), unknown=True)
        except (LoraCacheError, OSError, ValueError) as error:
            yield jobs.Refused(job.job, str(error), unknown=False)


def _carry_out(
    job: jobs.Examine | jobs.Pack, layouts: list[Layout], arena: memoryview
) -> jobs.Answer:
    from lora_cache.engines.resident import packing  # torch: the first job waits for it

    directory = Path(job.directory)
    if isinstance(job, jobs.Examine):
        contents = [packing.examine(layout, directory) for layout in layouts]
        sizes = [layout.nbytes(held) for layout, held in zip(layouts, contents, strict=True)]
        return jobs.Sizes(job.job, contents, sizes)
    started = time.monotonic()
    for layout, offset, nbytes in zip(layouts, job.offsets, job.nbytes, strict=True):
        packing.pack(layout, directory, arena[offset : offset + nbytes])
    return jobs.Packed(job.job, time.monotonic() - started)


def main(arguments: list[str]) -> None:
    fd, nbytes = map(int, arguments)
    # Nothing that a library prints may get between the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with mmap.mmap(fd, nbytes) as arena, memoryview(arena) as view:
        for answer in answers(sys.stdin.buffer, view):
            out.write(jobs.frame(answer))
            out.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
