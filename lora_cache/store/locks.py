"""Locks on directories, between threads and between processes.

`flock` on the directory itself: nothing is left behind, and the kernel drops the lock of a process
that dies.  Whoever has a lock has one on an inode, so after waiting for it one must look whether
the path still leads there.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from lora_cache.errors import StoreError

_SOON_S, _POLL_S = 0.25, 0.001


class Hold:
    """A lock on a directory, until `release` (idempotent) or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._is_use = False

    @classmethod
    def nothing(cls) -> Hold:
        """A hold on nothing."""
        hold = cls(-1)
        hold._descriptor = None
        return hold

    def as_use(self) -> Hold:
        """When it ends, the directory was used until then: its time of change says so."""
        self._is_use = True
        return self

    def share(self) -> None:
        """Let others hold it, too.  It may be lost meanwhile."""
        if self._descriptor is not None:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        with suppress(OSError):  # of a store that cannot be written
            if self._is_use:
                os.utime(descriptor)
        with suppress(OSError):
            # Closing is not enough: a process that was forked meanwhile has it open, too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def try_hold(directory: Path, *, exclusive: bool) -> Hold | None:
    """Lock `directory` without waiting.

    Args:
        exclusive: nobody else may hold it; otherwise only no one exclusively.

    Returns:
        None if it is held, or gone.
    """
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        return _lock(directory, kind | fcntl.LOCK_NB)
    except OSError:
        return None


def hold_soon(directory: Path) -> Hold | None:
    """Share a lock on `directory`, as soon as nobody has it exclusively.

    Whoever is only looking has it so for a moment; who has it for longer takes it away.

    Returns:
        None if it is gone, or held exclusively all the time.
    """
    deadline = time.monotonic() + _SOON_S
    while (hold := try_hold(directory, exclusive=False)) is None:
        if not os.path.isdir(directory) or time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    return hold


def wait_to_hold(directory: Path) -> Hold:
    """Lock `directory` exclusively, however long that takes.

    Raises:
        StoreError: it is gone.
    """
    try:
        while (hold := _lock(directory, fcntl.LOCK_EX)) is None:
            pass  # it was replaced while it was waited for
    except OSError as error:
        raise StoreError(f"{directory} cannot be locked: {error.strerror}") from error
    return hold


def _lock(directory: Path, operation: int) -> Hold | None:
    """None if `directory` is another one by now."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, operation)
        here, there = os.fstat(descriptor), os.stat(directory)
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            return Hold(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
