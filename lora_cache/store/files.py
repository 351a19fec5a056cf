"""Names, syncing and errors of what the store keeps on disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_cache.errors import DiskFullError, StoreError
from lora_cache.key import AdapterKey
from lora_cache.state import Tier

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_FOLDER = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{16}")


def folder_of(key: AdapterKey) -> str:
    """The name of the directory of `key`: readable, safe, and one to one."""
    name = _UNSAFE.sub("-", key.name)[:64].strip(".-") or "adapter"
    return f"{name}-{hashlib.sha256(key.digest.encode()).hexdigest()[:16]}"


def folders_in(directory: Path) -> Iterator[Path]:
    """The directories that a store made in `directory`.  What others put there is not its own."""
    for path in directory.iterdir():
        if _FOLDER.fullmatch(path.name) and path.is_dir():
            yield path


def make_directory(path: Path) -> None:
    """Make `path`, unless it is there.  Another process may remove it at any moment.

    `Path.mkdir(exist_ok=True)` fails if that is between its two looks.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise


def sync(path: Path) -> None:
    """Have the disk hold it: a crash of the machine, too, leaves nothing that only looks whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full(path: Path) -> DiskFullError:
    """The error of a file system that has no room for `path`."""
    return DiskFullError(
        f"the disk is full: {path} could not be written; free some room (lora-cache prune), or "
        "set disk_bytes below what the disk holds",
        tier=Tier.DISK,
    )


def disk_error(path: Path, error: OSError) -> StoreError:
    """What an operating system's error about `path` means for us."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(path)
    return StoreError(f"{path} cannot be used: {error.strerror or error}")


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """The operating system's errors about `path`, as ours."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
