"""The store's index: who was used when, and what refs meant.  One small SQLite file.

The files are the truth: what is lost here is lost recency.  So nothing waits for the disk, and a
damaged index is thrown away and made anew (`Store` fills it from the files).
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_cache.errors import StoreError

logger = logging.getLogger(__name__)

_SCHEMA = """
create table if not exists adapters (
    folder text primary key, digest text not null, name text not null, nbytes integer not null,
    partial integer not null, created real not null, used real not null, uses integer not null
) without rowid;
create table if not exists refs (ref text primary key, digest text not null, name text not null);
pragma user_version = 1;
"""
_BUSY_S = 30.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter in the store.

    Attributes:
        folder: name of its directory.
        partial: it is being fetched (`nbytes` is then what it will take), or its fetch broke off.
        created, used: seconds since 1970.
        uses: how often it was resolved.
    """

    folder: str
    digest: str
    name: str
    nbytes: int
    partial: bool
    created: float
    used: float
    uses: int = 0


class Index:
    """Thread-safe; several processes may have one file open.

    Args:
        rows: what the files say, for an index that is new or damaged.
    """

    def __init__(self, path: Path, rows: Callable[[], Iterable[Row]]) -> None:
        self._path = path
        self._rows = rows
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Exclusive for threads and processes: the accounting of the store happens in here.

        Raises:
            StoreError: it cannot be written.
        """
        with self._lock:
            database = self._mend(self._begin)
            try:
                yield database
                database.execute("commit")
            except BaseException as error:
                with suppress(sqlite3.Error):
                    database.execute("rollback")
                if isinstance(error, sqlite3.Error):
                    self.close()  # opened anew next time, and mended if need be
                    raise StoreError(f"{self._path} cannot be used: {error}") from error
                raise

    def rows(self) -> list[Row]:
        """All of them, longest unused first."""
        with self.transaction() as database:
            found = database.execute("select * from adapters order by used, folder").fetchall()
        return [
            Row(folder, digest, name, nbytes, bool(partial), created, used, uses)
            for folder, digest, name, nbytes, partial, created, used, uses in found
        ]

    def put(self, row: Row) -> None:
        with self.transaction() as database:
            put(database, row)

    def remove(self, folders: Iterable[str]) -> None:
        with self.transaction() as database:
            database.executemany(
                "delete from adapters where folder = ?", [(folder,) for folder in folders]
            )

    def touch(self, folder: str, now: float) -> None:
        """Note a use."""
        with self.transaction() as database:
            database.execute(
                "update adapters set used = max(used, ?), uses = uses + 1 where folder = ?",
                (now, folder),
            )

    def remember(self, ref: str, digest: str, name: str) -> None:
        """Note what `ref` means."""
        with self.transaction() as database:
            database.execute("insert or replace into refs values (?, ?, ?)", (ref, digest, name))

    def meaning(self, ref: str) -> tuple[str, str] | None:
        """Digest and name of what `ref` last meant."""
        with self.transaction() as database:
            found = database.execute("select digest, name from refs where ref = ?", (ref,))
            row: tuple[str, str] | None = found.fetchone()
            return row

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    # ------------------------------------------------------------------ opening, mending

    def _begin(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = self._open()
        self._database.execute("begin immediate")
        return self._database

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(
            self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            database.execute("pragma synchronous = off")
            if database.execute("pragma quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("the quick check failed")
            if database.execute("pragma user_version").fetchone() == (0,):
                database.execute("begin immediate")
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                for row in self._rows():
                    put(database, row)
                database.execute("commit")
        except BaseException:
            database.close()
            raise
        return database

    def _mend(self, step: Callable[[], _T]) -> _T:
        """Do `step`; if the file is damaged, once more with a new one."""
        try:
            return step()
        except sqlite3.OperationalError as error:  # locked, read-only, no room: not damage
            self.close()
            raise StoreError(f"{self._path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            logger.warning("%s is damaged (%s): rebuilding it from the files", self._path, error)
            self.close()
        try:
            for leftover in ("", "-journal"):
                Path(f"{self._path}{leftover}").unlink(missing_ok=True)
            return step()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self._path} cannot be rebuilt: {error}") from error


def put(database: sqlite3.Connection, row: Row) -> None:
    """Write one row, in a transaction of the caller's."""
    database.execute(
        "insert or replace into adapters values (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.folder,
            row.digest,
            row.name,
            row.nbytes,
            row.partial,
            row.created,
            row.used,
            row.uses,
        ),
    )
