"""The store's index: who was used when, and what refs meant.  One small SQLite file.

The files are the truth: what is lost here is lost recency.  So nothing waits for the disk, and a
damaged index is thrown away and made anew (`Store` fills it from the files).  One that was written
by another version is neither: it is refused.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_cache.errors import StoreError
from lora_cache.store.files import disk_error, disk_full

logger = logging.getLogger(__name__)

_SCHEMA = """
create table if not exists adapters (
    folder text primary key, digest text not null, name text not null, nbytes integer not null,
    partial integer not null, created real not null, used real not null, uses integer not null
) without rowid;
create table if not exists refs (ref text primary key, digest text not null, name text not null);
pragma user_version = 1
"""
_VERSION = 1
_COLUMNS = "folder, digest, name, nbytes, partial, created, used, uses"
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

    Its methods raise StoreError if the file cannot be read or written.

    Args:
        rows: what the files say, for an index that is new or damaged.
    """

    def __init__(self, path: Path, rows: Callable[[], Iterable[Row]]) -> None:
        self._path = path
        self._rows = rows
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None

    def rows(self) -> list[Row]:
        """All of them, longest unused first."""

        def read(database: sqlite3.Connection) -> list[Row]:
            found = database.execute(f"select {_COLUMNS} from adapters order by used, folder")
            return [
                Row(folder, digest, name, nbytes, bool(partial), created, used, uses)
                for folder, digest, name, nbytes, partial, created, used, uses in found
            ]

        return self._do(read, "begin")

    def put(self, row: Row) -> None:
        self._do(lambda database: _put(database, row))

    def remove(self, folders: Iterable[str]) -> None:
        names = [(folder,) for folder in folders]
        if names:
            self._do(lambda db: db.executemany("delete from adapters where folder = ?", names))

    def touch(self, folder: str, now: float) -> None:
        """Note a use."""
        change = "update adapters set used = max(used, ?), uses = uses + 1 where folder = ?"
        self._do(lambda database: database.execute(change, (now, folder)))

    def remember(self, ref: str, digest: str, name: str) -> None:
        """Note what `ref` means."""
        change = "insert or replace into refs (ref, digest, name) values (?, ?, ?)"
        self._do(lambda database: database.execute(change, (ref, digest, name)))

    def meaning(self, ref: str) -> tuple[str, str] | None:
        """Digest and name of what `ref` last meant."""

        def read(database: sqlite3.Connection) -> tuple[str, str] | None:
            found = database.execute("select digest, name from refs where ref = ?", (ref,))
            row: tuple[str, str] | None = found.fetchone()
            return row

        return self._do(read, "begin")

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    # ------------------------------------------------------------------ transactions

    def _do(self, step: Callable[[sqlite3.Connection], _T], begin: str = "begin immediate") -> _T:
        """Do `step` in a transaction; if that fails, once more with the file opened anew.

        Opening finds out what is wrong with the file, and mends it.
        """
        with self._lock:
            try:
                return self._try(step, begin)
            except sqlite3.Error as error:
                self.close()
                if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
                    raise self._error(error) from error
            try:
                return self._try(step, begin)
            except sqlite3.Error as error:
                self.close()
                raise self._error(error) from error

    def _try(self, step: Callable[[sqlite3.Connection], _T], begin: str) -> _T:
        if self._database is None or self._identity != _identity_of(self._path):
            self.close()  # somebody removed it, or put another in its place
            self._database = self._open()
            self._identity = _identity_of(self._path)
        try:
            self._database.execute(begin)
            done = step(self._database)
            self._database.execute("commit")
        except BaseException:
            with suppress(sqlite3.Error):
                self._database.execute("rollback")
            raise
        return done

    def _error(self, error: sqlite3.Error) -> StoreError:
        if _code(error) == sqlite3.SQLITE_FULL or "disk is full" in str(error):
            return disk_full(self._path)
        return StoreError(f"{self._path} cannot be used: {error}")

    # ------------------------------------------------------------------ opening, mending

    def _open(self) -> sqlite3.Connection:
        before = _identity_of(self._path)
        try:
            return self._connect()
        except sqlite3.OperationalError as error:  # locked, read-only, no room: not damage
            if not self._path.is_dir():
                raise
            damage: Exception = error
        except sqlite3.DatabaseError as error:
            damage = error
        if before == _identity_of(self._path):  # else another process has mended it
            logger.warning("%s is damaged (%s): rebuilding it from the files", self._path, damage)
            self._clear_away()
        return self._connect()

    def _clear_away(self) -> None:
        try:
            if self._path.is_dir():
                os.rename(self._path, f"{self._path}.not-ours-{time.time_ns()}")
            for leftover in ("", "-journal"):
                Path(f"{self._path}{leftover}").unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(self._path, error) from error

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(
            self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            database.execute("pragma synchronous = off")
            if database.execute("pragma quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("the quick check failed")
            if _version(database) == 0:
                self._fill(database)
            if (version := _version(database)) != _VERSION:
                raise StoreError(
                    f"{self._path} was written by another version of lora-cache (format {version}; "
                    f"this one knows {_VERSION}): give this one a store of its own, or remove the "
                    "file if the other is not used any more (only recency is lost)"
                )
            _require_columns(database)
        except BaseException:
            database.close()
            raise
        return database

    def _fill(self, database: sqlite3.Connection) -> None:
        """Make a new index of what the files say, unless another process is doing so."""
        database.execute("begin immediate")
        if _version(database) == 0:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            _require_columns(database)
            for row in self._rows():
                _put(database, row)
        database.execute("commit")


def _put(database: sqlite3.Connection, row: Row) -> None:
    database.execute(
        f"insert or replace into adapters ({_COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, ?)",
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


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("pragma user_version").fetchone()[0])


def _require_columns(database: sqlite3.Connection) -> None:
    try:
        database.execute(f"select {_COLUMNS} from adapters limit 0")
        database.execute("select ref, digest, name from refs limit 0")
    except sqlite3.OperationalError as error:
        if _code(error) != sqlite3.SQLITE_ERROR:
            raise
        raise sqlite3.DatabaseError(f"it has other tables: {error}") from error


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extension


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
