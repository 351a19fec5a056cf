"""Host memory that the packer writes and the workers read: one shared, nameless file.

It has no name in any file system: other processes open it through ``/proc`` while its owner lives,
and it is gone with the last process that has it mapped, however that one ends.  Pages cost memory
once they are written, and until they are discarded.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import insort

from lora_cache.engines.resident.layout import ALIGNMENT

#: Images start on pages, so that what is freed can be given back to the system.
PAGE = max(mmap.PAGESIZE, ALIGNMENT)

_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


class ArenaFullError(Exception):
    """There is no stretch of free bytes that is long enough.  Never leaves the engine."""


class Arena:
    """Allocates stretches of a shared memory file, the first that fits.

    Args:
        nbytes: how much there may be at most; rounded up to whole pages.

    One thread at a time, but for `discard`.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = _pages(nbytes)
        self.fd = os.memfd_create("lora-cache-arena", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.nbytes)
        # ctypes lets go of the interpreter lock, which mmap.madvise holds on to.
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._free = [(0, self.nbytes)]  # (offset, length), by offset; no two touch
        self._taken: dict[int, int] = {}  # offset → length

    @property
    def path(self) -> str:
        """Where other processes of this user open it, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def used(self) -> int:
        """Bytes allocated."""
        return sum(self._taken.values())

    def allocate(self, nbytes: int) -> int:
        """Take `nbytes`; returns the offset, a multiple of the page size.

        Raises:
            ArenaFullError: no free stretch is long enough.
        """
        needed = _pages(nbytes)
        for index, (offset, length) in enumerate(self._free):
            if length >= needed:
                rest = [(offset + needed, length - needed)] if length > needed else []
                self._free[index : index + 1] = rest
                self._taken[offset] = needed
                return offset
        raise ArenaFullError(
            f"{nbytes} bytes do not fit: {self.used} of {self.nbytes} are in use, the longest free "
            f"stretch is {max((length for _, length in self._free), default=0)}"
        )

    def discard(self, offset: int) -> None:
        """Give the memory of what `allocate` returned back to the system; it is still taken.

        Takes 12 ms for 100 MB.  Any thread, as long as nobody frees it meanwhile.

        Raises:
            OSError: the system keeps it.
        """
        where = ctypes.c_int64(offset), ctypes.c_int64(self._taken[offset])
        if self._libc.fallocate(self.fd, _PUNCH_HOLE, *where):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def free(self, offset: int) -> None:
        """Let what `allocate` returned be allocated again."""
        start, length = offset, self._taken.pop(offset)
        stop = start + length
        for neighbour in list(self._free):
            if neighbour[0] + neighbour[1] == start or neighbour[0] == stop:
                self._free.remove(neighbour)
                start = min(start, neighbour[0])
                stop = max(stop, sum(neighbour))
        insort(self._free, (start, stop - start))

    def close(self) -> None:
        """Let go of it; workers that have it mapped keep it until they unmap."""
        os.close(self.fd)

    def check(self) -> None:
        """Assert that free and taken stretches cover everything once (tests)."""
        stretches = sorted([*self._free, *self._taken.items()])
        end = 0
        for offset, length in stretches:
            assert offset == end
            assert length > 0
            end += length
        assert end == self.nbytes
        for (one, length), (other, _) in zip(self._free, self._free[1:], strict=False):
            assert one + length < other


def _pages(nbytes: int) -> int:
    return -(-max(nbytes, 1) // PAGE) * PAGE
