"""Where things lie in a store, and what the files alone say of them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lora_cache.errors import InvalidAdapterError
from lora_cache.store.files import errors_of, folders_in
from lora_cache.store.index import Row
from lora_cache.store.origin import Origin
from lora_cache.store.whole import read_origin

logger = logging.getLogger(__name__)


class Layout:
    """The directories of one store."""

    def __init__(self, root: Path) -> None:
        self.adapters = root / "adapters"
        self.partials = root / "partial"
        self.trash = root / "trash"
        self._all = (self.adapters, self.partials, self.trash)

    def is_there(self) -> bool:
        return all(path.is_dir() for path in self._all)

    def make(self) -> None:
        """Make the directories, and burn what others left in the trash."""
        for path in self._all:
            with errors_of(path):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        burn(self.trash.iterdir())

    def path_of(self, row: Row) -> Path:
        return (self.partials if row.partial else self.adapters) / row.folder

    def row_of(self, path: Path) -> Row | None:
        """What its files say of one directory; None if they are no whole adapter."""
        partial = path.parent == self.partials
        try:
            used = path.stat().st_mtime
            origin = Origin.read(path) if partial else read_origin(path)
        except (InvalidAdapterError, OSError) as error:
            logger.info("%s has not what belongs into it: %s", path, error)
            return None
        return Row(
            path.name, origin.digest, origin.name, origin.nbytes, partial, origin.fetched, used
        )

    def rows(self) -> Iterator[Row]:
        """What the files say of all directories that are whole, or being fetched."""
        for directory in (self.adapters, self.partials):
            if directory.is_dir():
                for path in folders_in(directory):
                    if (row := self.row_of(path)) is not None:
                        yield row

    def by_use(self, rows: Iterable[Row]) -> list[Row]:
        """Longest unused first, as the files say: what is held is used until it is released."""
        found = []
        for row in rows:
            used = row.used
            with suppress(OSError):
                used = max(used, self.path_of(row).stat().st_mtime)
            found.append(replace(row, used=used))
        return sorted(found, key=lambda row: row.used)


def burn(paths: Iterable[Path]) -> None:
    """Delete directories, as far as that is possible."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def empty(directory: Path) -> None:
    """Delete the files in it, as far as that is possible."""
    with suppress(OSError):
        for path in directory.iterdir():
            path.unlink()
