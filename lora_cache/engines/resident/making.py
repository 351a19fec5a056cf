"""The images of one adapter, one a worker: read from disk if they are kept there, or packed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cache.engines.resident import jobs
from lora_cache.engines.resident.hands import ALONE, Hands
from lora_cache.engines.resident.image_file import DamagedImageError, ImageFile
from lora_cache.engines.resident.image_store import ImageStore
from lora_cache.engines.resident.layout import Layout
from lora_cache.errors import AdapterNotFoundError, InvalidAdapterError
from lora_cache.manifest import read_stamp

if TYPE_CHECKING:
    from lora_cache.engines.resident.packing import Packing, Source

#: A file that was written a moment ago may have been written again within one tick of its clock,
#: and its stamp would not tell.  Its image is not kept, this time.  Git calls this "racy".
SETTLED_AFTER_NS = 2_000_000_000


class Making:
    """Knows what the images of an adapter will hold, and makes them.

    One thread at a time.  Close it when they are made.

    Attributes:
        parts: one a worker; each has `contents`, `nbytes` and `fill`.

    Raises:
        CannotPackError: vLLM's loader has to do it.
        InvalidAdapterError: a file cannot be read.
    """

    def __init__(
        self, wanted: jobs.Wanted, layouts: Sequence[Layout], store: ImageStore | None
    ) -> None:
        self._wanted = wanted
        self._layouts = layouts
        self._store = store if wanted.key else None
        self._source: Source | None = None
        self.parts: list[ImageFile | Packing] = []
        try:
            for layout in layouts:
                self.parts.append(self._find(layout) or self._pack(layout))
        except BaseException:
            self.close()
            raise

    def _find(self, layout: Layout) -> ImageFile | None:
        return self._store.find(layout.digest, self._wanted.key) if self._store else None

    def _pack(self, layout: Layout) -> Packing:
        from lora_cache.engines.resident import packing  # torch: images that are kept do without

        if self._source is None:
            self._source = packing.Source(Path(self._wanted.directory))
        return packing.Packing(layout, self._source)

    def fill(self, index: int, out: memoryview, hands: Hands = ALONE) -> bool:
        """Make the image of one worker.

        Returns:
            whether it had to be packed.

        Raises:
            as the constructor.
        """
        part = self.parts[index]
        if isinstance(part, ImageFile):
            try:
                part.fill(out, hands)
            except (DamagedImageError, OSError) as error:
                assert self._store is not None
                self._store.discard(part.path, error)
                part.close()
                self.parts[index] = part = self._pack(self._layouts[index])
            else:
                return False
        if part.nbytes != len(out):
            raise InvalidAdapterError(f"{self._wanted.directory} has changed")
        part.fill(out, hands)
        return True

    def is_worth_keeping(self) -> bool:
        """Is what was packed certainly of the files that the key was given for?"""
        if self._store is None or self._source is None:
            return False
        stamp = self._wanted.stamp
        try:
            if not self._source.stamp == stamp == read_stamp(Path(self._wanted.directory)):
                return False
        except AdapterNotFoundError:
            return False
        newest = max(ns for file in stamp for ns in file[3:])
        return time.time_ns() - newest > SETTLED_AFTER_NS

    def close(self) -> None:
        """Let go of the files."""
        for part in self.parts:
            if isinstance(part, ImageFile):
                part.close()
        if self._source is not None:
            self._source.close()
