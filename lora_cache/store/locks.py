"""Locks on directories, between threads and between processes.

`flock` on the directory itself: nothing is left behind, and the kernel drops the lock of a process
that dies.  Whoever has a lock has one on an inode, so after waiting for it one must look whether
the path still leads there.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from lora_cache.errors import StoreError


class Hold:
    """A lock on a directory, until `release` (idempotent) or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def nothing(cls) -> Hold:
        """A hold on nothing."""
        hold = cls(-1)
        hold._descriptor = None
        return hold

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

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
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        here, there = os.fstat(descriptor), os.stat(directory)
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            return Hold(descriptor)
    except OSError:
        pass  # held by somebody else, or moved away meanwhile
    with suppress(OSError):
        os.close(descriptor)
    return None


def wait_to_hold(directory: Path) -> Hold:
    """Lock `directory` exclusively, however long that takes.

    Raises:
        StoreError: it is gone.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise StoreError(f"{directory} cannot be locked: {error.strerror}") from error
    return Hold(descriptor)
