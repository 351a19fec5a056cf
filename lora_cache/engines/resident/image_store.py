"""Packed images on disk, so that what was packed once only has to be read again.

An image is named after what it is of: the adapter's key, which stands for its content, and the
digest of the layout that it was packed for.  So it can be missing, but never out of date.  Several
processes may share a directory; the least recently read images leave it when it is full.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

from lora_cache.engines.resident.image_file import (
    FORMAT,
    DamagedImageError,
    ImageFile,
    write_image,
)
from lora_cache.engines.resident.layout import Contents

logger = logging.getLogger(__name__)

_OURS = re.compile(r"[0-9a-f]{32}\.(image|part)")
_PART = ".part"  # an image that is being written; whoever writes it holds a lock on it

_FULL_TO = 0.95  # room is made for more than one image at a time
_COUNT_EVERY = 32  # writes: other processes write, too
_PAUSE_S = 60.0  # after a write failed


class ImageStore:
    """Images in one directory.

    Looking and reading may be done by any thread; writing by one at a time.

    Args:
        directory: made, for its owner alone, when the first image is written.
        max_bytes: what the images in it may take together.

    Attributes:
        damaged: files that were not what had been written, and are gone.
        evicted: images that had to make room.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.damaged = 0
        self.evicted = 0
        self._used = 0
        self._uncounted = _COUNT_EVERY  # writes since the directory was counted
        self._writes_after = 0.0
        self._warned = False

    # ------------------------------------------------------------------ reading

    def find(self, layout: str, key: str) -> ImageFile | None:
        """The image of an adapter, open, or None; counts as a use.

        Args:
            layout: a `Layout.digest`.
            key: an `AdapterKey`'s digest.
        """
        path = self._path(layout, key)
        try:
            if not self._is_private():
                return None
            image = ImageFile(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"{path} cannot be read: {error.strerror}")
            return None
        except DamagedImageError as error:
            self.discard(path, error)
            return None
        if (image.footer.layout, image.footer.key) != (layout, key):
            image.close()
            self.discard(path, DamagedImageError(f"{path} is another image's file"))
            return None
        with suppress(OSError):  # of a store that can only be read
            os.utime(image.fd)
        return image

    def discard(self, path: Path, error: Exception) -> None:
        """Remove a file that is not what was written."""
        self.damaged += 1
        logger.warning("a packed image is damaged, and its adapter is packed anew: %s", error)
        with suppress(OSError):
            path.unlink()

    # ------------------------------------------------------------------ writing

    def write(self, layout: str, key: str, contents: Contents, image: memoryview) -> bool:
        """Keep an image, if that is possible.  Never raises for the disk's sake.

        Returns:
            whether it is kept now.
        """
        if time.monotonic() < self._writes_after or len(image) > self.max_bytes:
            return False
        path = self._path(layout, key)
        if path.exists():  # another process was faster
            return True
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_private():
                return False
            self._make_room(len(image))
            return self._write(path, layout, key, contents, image)
        except OSError as error:
            self._writes_after = time.monotonic() + _PAUSE_S
            self._warn(
                f"packed images cannot be kept in {self.directory} ({error.strerror}): set "
                "image_dir, or image_bytes=0 to do without"
            )
            return False

    def _write(
        self, path: Path, layout: str, key: str, contents: Contents, image: memoryview
    ) -> bool:
        part = path.with_suffix(_PART)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not _own(fd, part):
                return False  # somebody else writes it, or just has
            try:
                os.ftruncate(fd, 0)  # what a writer left that was killed
                write_image(fd, image, layout, key, contents)
                os.replace(part, path)
            except BaseException:
                with suppress(OSError):
                    part.unlink()
                raise
            self._used += os.fstat(fd).st_size
        finally:
            os.close(fd)
        return True

    def _make_room(self, nbytes: int) -> None:
        """Let the least recently used go, until `nbytes` more fit."""
        if self._uncounted < _COUNT_EVERY and self._used + nbytes <= self.max_bytes:
            self._uncounted += 1
            return
        found = sorted(self._files())
        self._used = sum(size for _, size, _ in found)
        self._uncounted = 0
        if self._used + nbytes <= self.max_bytes:
            return
        goal = min(_FULL_TO * self.max_bytes, self.max_bytes - nbytes)
        for _, size, path in found:
            if self._used <= goal:
                break
            if _remove(path):
                self.evicted += 1
                self._used -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each was last used, its size, and where it is; files of others are not looked at."""
        found = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name):
                    with suppress(OSError):
                        held = entry.stat(follow_symlinks=False)
                        found.append((held.st_mtime_ns, held.st_size, Path(entry.path)))
        return found

    # ------------------------------------------------------------------ inside

    def _path(self, layout: str, key: str) -> Path:
        name = hashlib.sha256(repr((FORMAT, layout, key)).encode()).hexdigest()[:32]
        return self.directory / f"{name}.image"

    def _is_private(self) -> bool:
        """Others must not be able to put in what vLLM will compute with."""
        found = os.stat(self.directory)
        if found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077:
            return True
        self._warn(f"{self.directory} is not used: it must be yours alone (mode 0700)")
        return False

    def _warn(self, message: str) -> None:
        """Once: it would be said for every adapter."""
        if not self._warned:
            self._warned = True
            logger.warning(message)


def _own(fd: int, path: Path) -> bool:
    """Lock the file, and see that it is still the one at `path`: a writer renames it at the end."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        here, there = os.fstat(fd), os.stat(path, follow_symlinks=False)
    except (BlockingIOError, FileNotFoundError):
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _remove(path: Path) -> bool:
    """Remove a file of the store, unless it is being written."""
    with suppress(OSError):
        if path.suffix != _PART:
            path.unlink(missing_ok=True)
            return True
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if _own(fd, path):
                path.unlink()
                return True
        finally:
            os.close(fd)
    return False
