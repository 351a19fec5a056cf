"""Adapters in local directories, identified by their content."""

from __future__ import annotations

import os
import time
from pathlib import Path

from blake3 import blake3

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import AdapterChangedError, AdapterNotFoundError, InvalidAdapterError
from lora_cache.manifest import FILES, Stamp, read_manifest, read_stamp
from lora_cache.sources.content import content_digest

# A file that was written a moment ago can be written again without its times changing (their
# granularity is a timer tick), so its digest is not remembered yet.  Git calls this "racy".
_SETTLED_AFTER_NS = 2_000_000_000
_MAX_REMEMBERED = 100_000


class LocalSource:
    """Directories as PEFT's `save_pretrained` writes them.

    The key is a BLAKE3 of the two files that vLLM reads, so the same adapter in two places is
    one adapter, and new content under an old path is a new one.  Digests are remembered by
    device, inode, size and times of change.  Thread-safe.
    """

    def __init__(self) -> None:
        self._digests: dict[Stamp, str] = {}

    def resolve(self, ref: AdapterRef) -> Adapter:
        directory = Path(os.path.realpath(ref.location))
        stamp = _stamp_or_none(directory)
        manifest = read_manifest(directory)  # says best what is wrong, if something is missing
        if stamp is None:
            raise AdapterChangedError(f"{directory} is being written: try again")
        digest = self._digests.get(stamp) or self._read_digest(directory)
        if read_stamp(directory) != stamp:
            raise AdapterChangedError(f"{directory} was written to while it was read: try again")
        self._remember(stamp, digest)
        name = os.path.basename(ref.location) or directory.name
        return Adapter(AdapterKey(f"blake3:{digest}", name), directory, manifest, stamp)

    def is_current(self, ref: AdapterRef, adapter: Adapter) -> bool:
        # By the name that was given: a link may lead elsewhere by now.
        return _stamp_or_none(Path(ref.location)) == adapter.stamp

    def _read_digest(self, directory: Path) -> str:
        digest = blake3()
        try:
            for name in FILES:
                digest.update(content_digest(directory / name))
        except EOFError as error:
            raise AdapterChangedError(
                f"{directory} was written to while it was read: try again"
            ) from error
        except OSError as error:
            raise InvalidAdapterError(f"{directory} cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    def _remember(self, stamp: Stamp, digest: str) -> None:
        newest = max(ns for file in stamp for ns in file[3:])
        if time.time_ns() - newest > _SETTLED_AFTER_NS:
            if len(self._digests) >= _MAX_REMEMBERED:
                self._digests.clear()
            self._digests[stamp] = digest


def _stamp_or_none(directory: Path) -> Stamp | None:
    try:
        return read_stamp(directory)
    except AdapterNotFoundError:
        return None
