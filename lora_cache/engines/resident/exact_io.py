"""Reads and writes at an offset that are whole, or an error: the system may do less than asked."""

from __future__ import annotations

import os


def read_exactly(fd: int, out: memoryview, offset: int) -> None:
    """Fill `out` from a file.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    done = 0
    while done < len(out):
        got = os.preadv(fd, [out[done:]], offset + done)
        if not got:
            raise EOFError(f"the file ends at byte {offset + done}")
        done += got


def write_exactly(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` into a file.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
