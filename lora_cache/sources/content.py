"""A digest of a file's content; of a large one by several threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from blake3 import blake3

from lora_cache.exact_io import read_exactly

_PIECE_BYTES = 1 << 20
_LARGE_BYTES = 16 << 20  # smaller ones are digested before the threads have started
_MOST_THREADS = 4


def content_digest(path: str | os.PathLike[str]) -> bytes:
    """BLAKE3 of a file, or of the BLAKE3s of a large one's pieces: equal for equal content.

    One thread digests 3 GB/s; with SHA-256 it was one, and most of what a new adapter's loading
    took.  Reading takes as long again, so there are several.

    Raises:
        OSError: it cannot be read.
        EOFError: it was cut while it was read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _LARGE_BYTES:
            return blake3(file.read()).digest()
        return _by_pieces(file.fileno(), size)


def _by_pieces(descriptor: int, size: int) -> bytes:
    count = -(-size // _PIECE_BYTES)
    threads = min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 4))
    digests = [b""] * count

    def work(first: int) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        for number in range(first, count, threads):
            start = number * _PIECE_BYTES
            piece = buffer[: min(_PIECE_BYTES, size - start)]
            read_exactly(descriptor, piece, start)
            digests[number] = blake3(piece).digest()

    with ThreadPoolExecutor(threads, "lora-cache-digest") as pool:
        for call in [pool.submit(work, first) for first in range(threads)]:
            call.result()
    # The size comes first, so that no small file's digest is that of a large one.
    return blake3(b"%d pieces of %d: " % (size, _PIECE_BYTES) + b"".join(digests)).digest()
