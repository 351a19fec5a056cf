"""The packer process: reads adapters and writes their images into the arena.

    python -m lora_cache.engines.resident.packer ARENA_FD ARENA_BYTES [IMAGE_DIR IMAGE_BYTES]

A process of its own, so that it shares no interpreter lock with the step loop.  It takes jobs on
standard input, and ends with it: whoever started it may die in any way.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
from importlib import import_module
from pathlib import Path

from lora_cache.engines.resident import jobs
from lora_cache.engines.resident.image_store import ImageStore
from lora_cache.engines.resident.workshop import Workshop


def _import() -> None:
    """Bring in torch, which takes longer than an image does, before the first job needs it."""
    try:
        import_module("lora_cache.engines.resident.packing")
    finally:
        # What imports have brought stays: to look through it for garbage takes 0.1 s, and all
        # packing waits.
        gc.freeze()
        gc.enable()


def main(arguments: list[str]) -> None:
    gc.disable()
    threading.Thread(target=_import, name="lora-cache-imports", daemon=True).start()
    fd, nbytes = map(int, arguments[:2])
    store = ImageStore(Path(arguments[2]), int(arguments[3])) if arguments[2:] else None
    # Nothing that a library prints may get between the answers.
    out = os.dup(1)
    os.dup2(2, 1)
    arena = memoryview(mmap.mmap(fd, nbytes))
    answering = threading.Lock()

    def answer(message: jobs.Answer) -> None:
        left = memoryview(jobs.encode(message))
        with answering:
            while left:
                left = left[os.write(out, left) :]

    workshop = Workshop(arena, store, answer)
    frames = jobs.job_frames()
    while data := os.read(0, 1 << 16):
        for job in frames.feed(data):
            workshop.take(job)
    os._exit(0)  # what is still being done is of no use to anybody


if __name__ == "__main__":
    main(sys.argv[1:])
