"""The disk tier: adapters that were fetched, under a byte budget, shared by processes.

::

    STORE/adapters/FOLDER/   whole adapters; they come here by one `rename` and never change
    STORE/partial/FOLDER/    what is being fetched, or was when its process died
    STORE/trash/             on its way out
    STORE/index.sqlite       recency, and what refs meant (`index.py`)

Who uses an adapter holds a shared lock on its directory, who fetches or removes it an exclusive
one (`locks.py`).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import (
    AdapterError,
    AdapterNotFoundError,
    DiskFullError,
    InvalidAdapterError,
    StoreError,
)
from lora_cache.manifest import FILES, read_manifest, read_stamp
from lora_cache.policies import PolicyLike, make_policy
from lora_cache.sources.base import RemoteFile
from lora_cache.state import Tier
from lora_cache.store.index import Index, Row
from lora_cache.store.locks import Hold, try_hold, wait_to_hold
from lora_cache.store.origin import ORIGIN_FILE, Origin

logger = logging.getLogger(__name__)

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_POLL_S = 0.05
_CHUNK_BYTES = 1 << 20
_MAX_REPLAYED = 64  # uses of one adapter that a policy is told of


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter in the store, as `Store.entries` lists it.

    Attributes:
        in_use: some process holds it, or is fetching it.
    """

    row: Row
    path: Path
    in_use: bool


class Store:
    """Whole adapters on disk.  Thread-safe; several processes may share one directory.

    Args:
        root: made when it is first needed.
        max_bytes: budget for everything in it, or None.
        policy: who leaves when the budget is reached; it is asked about the index as a whole, so
            it sees how often and when each adapter was last used, by all processes.
    """

    def __init__(
        self, root: Path, *, max_bytes: int | None = None, policy: PolicyLike = "lru"
    ) -> None:
        make_policy(policy)  # an unknown one is an error now, not when the disk is full
        self.root = root
        self.max_bytes = max_bytes
        self._policy = policy
        self._index = Index(root / "index.sqlite", self._rows_on_disk)
        self._is_open = False

    # ------------------------------------------------------------------ looking

    def find(self, key: AdapterKey) -> Adapter | None:
        """The adapter of `key`, if it is here; counts as a use.

        Raises:
            StoreError: the store cannot be read.
        """
        folder = folder_of(key)
        path = self._adapters / folder
        if not path.is_dir():
            return None
        self._open()
        try:
            adapter = Adapter(key, path, read_manifest(path), read_stamp(path))
        except (AdapterNotFoundError, InvalidAdapterError) as error:
            if path.is_dir():  # not merely removed this moment
                logger.warning("%s is damaged and will be fetched anew: %s", path, error)
                self._throw_away(path)
            return None
        self._index.touch(folder, time.time())
        return adapter

    def hold(self, adapter: Adapter) -> Hold | None:
        """Keep `adapter` from being removed, by any process; None if it is gone.

        Adapters that are not in this store are not its to hold: that returns a hold on nothing.
        """
        if adapter.path.parent != self._adapters:
            return Hold.nothing()
        return try_hold(adapter.path, exclusive=False)

    def entries(self) -> list[Entry]:
        """What is here, longest unused first."""
        if not self.root.is_dir():
            return []
        self._open()
        found = []
        for row in self._index.rows():
            path = self._path_of(row)
            free = try_hold(path, exclusive=True)
            if free is not None:
                free.release()
            if path.is_dir():
                found.append(Entry(row, path, in_use=free is None))
        return found

    def verify(self, row: Row) -> str | None:
        """Read all of one adapter.  Returns what is wrong with it, or None."""
        path = self._path_of(row)
        try:
            for file in Origin.read(path).remote_files:
                content = path / file.name
                if content.stat().st_size != file.nbytes:
                    return f"{file.name} has another size than its source promised"
                if digest_of(content, file) != file.digest:
                    return f"{file.name} has another digest than its source promised"
            read_manifest(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
        except AdapterError as error:
            return str(error)
        return None

    # ------------------------------------------------------------------ what refs meant

    def remember(self, ref: AdapterRef, key: AdapterKey) -> None:
        """Note that `ref` meant `key`, for times without a network."""
        self._open()
        self._index.remember(_text(ref), key.digest, key.name)

    def meaning(self, ref: AdapterRef) -> AdapterKey | None:
        """What `ref` last meant."""
        if not self.root.is_dir():
            return None
        self._open()
        found = self._index.meaning(_text(ref))
        return None if found is None else AdapterKey(*found)

    # ------------------------------------------------------------------ bringing in

    @contextmanager
    def partial(self, key: AdapterKey, check: Callable[[], None]) -> Iterator[Path | None]:
        """A directory to fetch `key` into, for one thread of one process at a time.

        Whole files that an earlier fetch left in it are the caller's to use.

        Args:
            check: called while another process is waited for; raises to give up.

        Yields:
            None if the adapter is here: another process was faster.
        """
        self._open()
        path = self._partials / folder_of(key)
        while True:
            if (self._adapters / path.name).is_dir():
                yield None
                return
            with _errors_of(path):
                path.mkdir(mode=0o700, exist_ok=True)
            if (hold := try_hold(path, exclusive=True)) is not None:
                break
            check()
            time.sleep(_POLL_S)
        with hold:
            yield path

    def reserve(self, key: AdapterKey, nbytes: int) -> None:
        """Set room aside for what `partial` gave a directory for; makes room if need be.

        Raises:
            DiskFullError: the budget cannot hold it, or what is in the way is in use.
        """
        now = time.time()
        own = Row(folder_of(key), key.digest, key.name, nbytes, True, now, now)
        trash: list[Path] = []
        try:
            with wait_to_hold(self.root):  # one at a time, over all processes
                if self.max_bytes is not None:
                    trash = self._make_room(own, self.max_bytes)
                self._index.put(own)
        finally:
            self._burn(trash)

    def publish(self, partial: Path, origin: Origin) -> Adapter:
        """Make what was fetched into `partial` an adapter of the store: whole, at once, for good.

        Raises:
            AdapterError: what was fetched is no adapter that can be served.
        """
        manifest = read_manifest(partial)
        path = self._adapters / partial.name
        with _errors_of(path):
            origin.write(partial)
            for name in (*FILES, ORIGIN_FILE, "."):
                _sync(partial / name)
            os.rename(partial, path)
            _sync(self._adapters)
        now = time.time()
        self._index.put(
            Row(path.name, origin.digest, origin.name, origin.nbytes, False, now, now, 1)
        )
        return Adapter(origin.key, path, manifest, read_stamp(path))

    # ------------------------------------------------------------------ removing

    def remove(self, rows: Iterable[Row]) -> list[Row]:
        """Remove what no process uses.  Returns what is gone."""
        gone, trash = [], []
        for row in rows:
            if (path := self._discard(row)) is not None:
                gone.append(row)
                trash.append(path)
        self._burn(trash)
        return gone

    def close(self) -> None:
        """Close the index.  The store may be used again."""
        self._index.close()
        self._is_open = False

    # ------------------------------------------------------------------ inside

    @property
    def _adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def _partials(self) -> Path:
        return self.root / "partial"

    @property
    def _trash(self) -> Path:
        return self.root / "trash"

    def _path_of(self, row: Row) -> Path:
        return (self._partials if row.partial else self._adapters) / row.folder

    def _open(self) -> None:
        """Make the directories, and let index and files agree."""
        if self._is_open:
            return
        with _errors_of(self.root):
            for path in (self._adapters, self._partials, self._trash):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._burn(list(self._trash.iterdir()))
            known = {self._path_of(row) for row in self._index.rows()}
            there = {*self._adapters.iterdir(), *self._partials.iterdir()}
            for path in there - known:
                if (row := self._row_of(path)) is not None:
                    self._index.put(row)
            self._index.remove({path.name for path in known} - {path.name for path in there})
        self._is_open = True

    def _rows_on_disk(self) -> Iterator[Row]:
        """What the files say."""
        for path in (*self._adapters.iterdir(), *self._partials.iterdir()):
            if (row := self._row_of(path)) is not None:
                yield row

    def _row_of(self, path: Path) -> Row | None:
        """What its files say of one directory; an adapter that is not whole is thrown away."""
        try:
            used = path.stat().st_mtime
            sizes = {file.name: file.stat().st_size for file in path.iterdir()}
            if path.parent == self._partials:
                name = path.name.rpartition("-")[0]
                return Row(path.name, "", name, sum(sizes.values()), True, used, used)
            origin = Origin.read(path)
            if any(sizes.get(name) != file.nbytes for name, file in origin.files.items()):
                raise InvalidAdapterError(f"{path} is not whole")
            return Row(
                path.name, origin.digest, origin.name, origin.nbytes, False, origin.fetched, used
            )
        except (InvalidAdapterError, OSError) as error:
            logger.warning("%s does not belong here (%s): it is removed", path, error)
            self._throw_away(path)
            return None

    def _make_room(self, newcomer: Row, max_bytes: int) -> list[Path]:
        """Evict until `newcomer` fits; what is returned is to be burned."""
        rows = [row for row in self._index.rows() if row.folder != newcomer.folder]
        excess = sum(row.nbytes for row in rows) + newcomer.nbytes - max_bytes
        trash = []
        for row in self._victims(rows) if excess > 0 else ():
            if (gone := self._discard(row)) is not None:
                trash.append(gone)
                excess -= row.nbytes
            if excess <= 0:
                return trash
        if excess > 0:
            self._burn(trash)
            raise DiskFullError(
                f"{newcomer.name} needs {newcomer.nbytes} bytes on disk; disk_bytes={max_bytes} "
                f"does not leave them in {self.root}, where all else is in use: raise disk_bytes",
                tier=Tier.DISK,
            )
        return trash

    def _victims(self, rows: list[Row]) -> Iterator[Row]:
        """Who goes first: fetches that broke off, then as the policy says.

        Args:
            rows: by last use.
        """
        yield from (row for row in rows if row.partial)
        policy = make_policy(self._policy)
        whole = {AdapterKey(row.folder): row for row in rows if not row.partial}
        for key, row in whole.items():
            policy.on_insert(key, row.nbytes, float(row.nbytes), row.used)
            for _ in range(min(row.uses, _MAX_REPLAYED)):
                policy.on_access(key, row.used)
        for key in policy.rank_victims(rows[-1].used if rows else 0.0):
            yield whole[key]

    def _discard(self, row: Row) -> Path | None:
        """Take an adapter out of the store, if nobody uses it; what is returned is to be burned."""
        path = self._path_of(row)
        hold = try_hold(path, exclusive=True)
        if hold is None:
            if not path.is_dir():
                self._index.remove([row.folder])
            return None
        with hold, _errors_of(path):
            target = self._trash / uuid.uuid4().hex
            os.rename(path, target)
        self._index.remove([row.folder])
        return target

    def _throw_away(self, path: Path) -> None:
        """Take out what is damaged, unless somebody uses it all the same."""
        if (hold := try_hold(path, exclusive=True)) is not None:
            with hold, suppress(OSError):
                os.rename(path, target := self._trash / uuid.uuid4().hex)
                self._burn([target])

    def _burn(self, paths: Iterable[Path]) -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)


def folder_of(key: AdapterKey) -> str:
    """The name of the directory of `key`: readable, safe, and one to one."""
    name = _UNSAFE.sub("-", key.name)[:64].strip(".-") or "adapter"
    return f"{name}-{hashlib.sha256(key.digest.encode()).hexdigest()[:16]}"


def digest_of(path: Path, promised: RemoteFile) -> str:
    """The digest of a file's content, of the kind that was promised."""
    kind, digest = "sha256", hashlib.sha256()
    if promised.digest.startswith("git-sha1:"):
        kind, digest = "git-sha1", hashlib.sha1(usedforsecurity=False)
        digest.update(b"blob %d\x00" % promised.nbytes)  # git hashes its header, too
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return f"{kind}:{digest.hexdigest()}"


def _text(ref: AdapterRef) -> str:
    return f"{ref.source}:{ref}"


def _sync(path: Path) -> None:
    """Have the disk hold it: a crash of the machine, too, leaves nothing that only looks whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(path: Path, error: OSError) -> StoreError:
    """What an operating system's error about `path` means for us."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"the disk is full: {path} could not be written; free some room (lora-cache prune), or "
            "set disk_bytes below what the disk holds",
            tier=Tier.DISK,
        )
    return StoreError(f"{path} cannot be used: {error.strerror or error}")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
