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

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import (
    AdapterNotFoundError,
    DiskFullError,
    InvalidAdapterError,
    StoreError,
    UnsupportedAdapterError,
)
from lora_cache.manifest import FILES, read_manifest, read_stamp
from lora_cache.policies import PolicyLike, make_policy
from lora_cache.state import Tier
from lora_cache.store.files import errors_of, folder_of, folders_in, make_directory, sync
from lora_cache.store.index import Index, Row
from lora_cache.store.layout import Layout, burn, empty
from lora_cache.store.locks import Hold, hold_soon, try_hold, wait_to_hold
from lora_cache.store.origin import ORIGIN_FILE, Origin
from lora_cache.store.victims import victims
from lora_cache.store.whole import fault_of, is_whole, read_adapter

logger = logging.getLogger(__name__)

_POLL_S = 0.05


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
        self._layout = Layout(root)
        self._index = Index(root / "index.sqlite", self._rebuild)
        self._is_open = False
        self._fetching: dict[Path, Hold] = {}

    # ------------------------------------------------------------------ looking

    def find(self, key: AdapterKey) -> Adapter | None:
        """The adapter of `key`, if it is here; counts as a use.

        Raises:
            StoreError: the store cannot be read.
        """
        path = self._layout.adapters / folder_of(key)
        with errors_of(path):
            hold = hold_soon(path) if path.is_dir() else None
        if hold is None:
            return None
        with hold:
            try:
                adapter = read_adapter(path)
            except (AdapterNotFoundError, InvalidAdapterError) as error:
                logger.warning("%s is damaged and will be fetched anew: %s", path, error)
                adapter = None
            else:
                with suppress(OSError):
                    os.utime(path)
        if adapter is None:
            with wait_to_hold(self.root):
                self._throw_away(path)
            return None
        self._note(lambda: self._index.touch(path.name, time.time()))
        return adapter

    def hold(self, adapter: Adapter) -> Hold | None:
        """Keep `adapter` from being removed, by any process; None if it is gone.

        Adapters that are not in this store are not its to hold: that returns a hold on nothing.
        """
        if adapter.path.parent != self._layout.adapters:
            return Hold.nothing()
        hold = hold_soon(adapter.path)
        return None if hold is None else hold.as_use()

    def entries(self) -> list[Entry]:
        """What is here, longest unused first.  A store that cannot be written is read as it is."""
        with errors_of(self.root):
            if not self._layout.adapters.is_dir():
                return []
            try:
                self._open()
                rows = self._index.rows()
            except StoreError as error:
                logger.info("%s; looking at the files instead", error)
                rows = list(self._layout.rows())
        found = []
        for row in self._layout.by_use(rows):
            path = self._layout.path_of(row)
            free = try_hold(path, exclusive=True)
            if free is not None:
                free.release()
            if path.is_dir():
                found.append(Entry(row, path, in_use=free is None))
        return found

    def verify(self, row: Row) -> str | None:
        """What is wrong with an adapter, every byte of it read; None if nothing is."""
        path = self._layout.path_of(row)
        if row.partial:
            return f"{path} is not whole: its fetch has not ended"
        if (hold := hold_soon(path)) is None:
            return f"{path} is gone, or on its way out"
        with hold:
            return fault_of(path)

    # ------------------------------------------------------------------ what refs meant

    def remember(self, ref: AdapterRef, key: AdapterKey) -> None:
        """Note that `ref` meant `key`, for times without a network."""
        self._note(lambda: self._index.remember(_text(ref), key.digest, key.name))

    def meaning(self, ref: AdapterRef) -> AdapterKey | None:
        """What `ref` last meant."""
        if not self.root.is_dir():
            return None
        try:
            found = self._index.meaning(_text(ref))
        except StoreError as error:
            logger.info("%s; not known what %s meant", error, ref)
            return None
        return None if found is None else AdapterKey(*found)

    # ------------------------------------------------------------------ bringing in

    @contextmanager
    def partial(self, key: AdapterKey, check: Callable[[], None]) -> Iterator[Path | None]:
        """A directory to fetch `key` into, for one thread of one process at a time.

        What an earlier fetch left in it is the caller's to use.  It stays when the caller fails,
        but for want of room (then others get the room), or because it can never be an adapter.

        Args:
            check: called while another process is waited for; raises to give up.

        Yields:
            None if the adapter is here: another process was faster.
        """
        self._open()
        path = self._layout.partials / folder_of(key)
        hold = self._hold_partial(path, check)
        if hold is None:
            yield None
            return
        with hold:
            self._fetching[path] = hold
            try:
                yield path
            except (DiskFullError, InvalidAdapterError, UnsupportedAdapterError):
                empty(path)
                raise
            finally:
                del self._fetching[path]
                self._drop_if_empty(path)

    def reserve(self, partial: Path, origin: Origin) -> None:
        """Set room aside for what is to be fetched into `partial`; makes room if need be.

        Raises:
            DiskFullError: the budget cannot hold it, or what is in the way is in use.
        """
        now = time.time()
        own = Row(partial.name, origin.digest, origin.name, origin.nbytes, True, now, now)
        trash: list[Path] = []
        with wait_to_hold(self.root):  # one at a time, over all processes
            if self.max_bytes is not None:
                trash = self._make_room(own, self.max_bytes)
            with errors_of(partial):
                origin.write(partial)  # so that the files alone say what was reserved
            self._index.put(own)
        burn(trash)

    def publish(self, partial: Path, origin: Origin) -> Adapter:
        """Make what was fetched into `partial` an adapter of the store: whole, at once, for good.

        Raises:
            AdapterError: what was fetched is no adapter that can be served.
        """
        manifest = read_manifest(partial)
        path = self._layout.adapters / partial.name
        now = time.time()
        row = Row(path.name, origin.digest, origin.name, origin.nbytes, False, now, now, 1)
        with errors_of(path):
            origin.write(partial)
            for name in (*FILES, ORIGIN_FILE, "."):
                sync(partial / name)
            with wait_to_hold(self.root):
                os.rename(partial, path)
                if (hold := self._fetching.get(partial)) is not None:
                    hold.share()
                try:
                    self._index.put(row)
                except StoreError as error:  # it is here all the same
                    logger.info("%s; going on without", error)
                    self._is_open = False
            sync(self._layout.adapters)
        return Adapter(origin.key, path, manifest, read_stamp(path))

    # ------------------------------------------------------------------ removing

    def remove(self, rows: Iterable[Row]) -> list[Row]:
        """Remove what no process uses.  Returns what is gone.

        Raises:
            StoreError: the store cannot be written.  A full disk or a damaged index is no reason.
        """
        self._layout.make()
        gone, trash = [], []
        with wait_to_hold(self.root):
            for row in rows:
                path = self._layout.path_of(row)
                if (hold := try_hold(path, exclusive=True)) is not None:
                    with hold:
                        trash.append(self._take_out(path))
                    gone.append(row)
        burn(trash)
        return gone

    def close(self) -> None:
        """Close the index.  The store may be used again."""
        self._index.close()
        self._is_open = False

    # ------------------------------------------------------------------ inside

    def _open(self) -> None:
        """Make the directories, and let index and files agree."""
        if self._is_open and self._layout.is_there():
            return
        with errors_of(self.root):
            self._layout.make()
            with wait_to_hold(self.root):
                self._is_open = True
                try:
                    self._reconcile()
                except BaseException:
                    self._is_open = False
                    raise

    def _rebuild(self) -> Iterator[Row]:
        """Fill a new index."""
        self._is_open = False  # what is not whole is thrown away when it is opened again
        return self._layout.rows()

    def _note(self, step: Callable[[], None]) -> None:
        """Write down what is of use later: a store that is full or read-only does without."""
        try:
            self._open()
            step()
        except StoreError as error:
            logger.info("%s; going on without", error)
            self._is_open = False  # index and files may disagree

    def _reconcile(self) -> None:
        """What the files say goes into the index; what is in neither state goes away."""
        layout = self._layout
        whole, parts = set(folders_in(layout.adapters)), set(folders_in(layout.partials))
        for path in [path for path in parts if layout.adapters / path.name in whole]:
            parts.discard(path)
            self._throw_away(path)
        known = {self._layout.path_of(row): row for row in self._index.rows()}
        for path in (whole | parts) - known.keys():
            if (row := self._layout.row_of(path)) is not None:
                self._index.put(row)
            else:
                self._throw_away(path)
        here = {path.name for path in whole | parts}
        self._index.remove({row.folder for row in known.values()} - here)

    def _hold_partial(self, path: Path, check: Callable[[], None]) -> Hold | None:
        """None if the adapter is here by now."""
        twin = self._layout.adapters / path.name
        while True:
            with errors_of(path):
                if twin.is_dir():
                    return None
                make_directory(path)
            if (hold := try_hold(path, exclusive=True)) is not None:
                if not twin.is_dir():
                    return hold
                with hold:
                    self._drop_if_empty(path)  # it was published between the two looks
                return None
            check()
            time.sleep(_POLL_S)

    def _drop_if_empty(self, path: Path) -> None:
        """Forget a fetch that left nothing."""
        if not path.is_dir():
            return
        with suppress(OSError, StoreError), wait_to_hold(self.root):
            path.rmdir()
            if not (self._layout.adapters / path.name).is_dir():
                self._index.remove([path.name])

    def _make_room(self, newcomer: Row, max_bytes: int) -> list[Path]:
        """Evict until `newcomer` fits, or nobody; what is returned is to be burned."""
        rows = [row for row in self._index.rows() if row.folder != newcomer.folder]
        gone = [row for row in rows if not self._layout.path_of(row).is_dir()]
        self._index.remove(row.folder for row in gone)
        rows = self._layout.by_use(row for row in rows if row not in gone)
        excess = sum(row.nbytes for row in rows) + newcomer.nbytes - max_bytes
        taken: list[tuple[Path, Hold]] = []
        try:
            for row in victims(self._policy, rows):
                if excess <= 0:
                    break
                path = self._layout.path_of(row)
                if (hold := try_hold(path, exclusive=True)) is not None:
                    taken.append((path, hold))
                    excess -= row.nbytes
            if excess > 0:
                raise DiskFullError(
                    f"{newcomer.name} needs {newcomer.nbytes} bytes on disk, and disk_bytes="
                    f"{max_bytes} leaves {max(0, newcomer.nbytes - excess)} in {self.root} beside "
                    "what is in use: raise disk_bytes, or let adapters go that are loaded",
                    tier=Tier.DISK,
                )
            return [self._take_out(path) for path, _ in taken]
        finally:
            for _, hold in taken:
                hold.release()

    def _take_out(self, path: Path) -> Path:
        """Take a directory that is held out of the store; what is returned is to be burned."""
        with errors_of(path):
            target = self._layout.trash / uuid.uuid4().hex
            os.rename(path, target)
        try:
            self._index.remove([path.name])
        except StoreError as error:  # a row without files counts for nothing
            logger.info("%s; going on without", error)
            self._is_open = False
        return target

    def _throw_away(self, path: Path) -> None:
        """Take out what is damaged, unless somebody uses it all the same."""
        if (hold := try_hold(path, exclusive=True)) is None:
            return
        with hold, suppress(StoreError):  # of a store that cannot be written
            if path.parent == self._layout.adapters and is_whole(path):
                return  # published anew meanwhile
            burn([self._take_out(path)])


def _text(ref: AdapterRef) -> str:
    return f"{ref.source}:{ref}"
