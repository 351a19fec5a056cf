"""Fetch one adapter into the store: resumed, counted, verified, published."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lora_cache.adapter import Adapter
from lora_cache.errors import (
    InvalidAdapterError,
    LoraCacheError,
    SourceError,
    StoreError,
    UnsupportedAdapterError,
)
from lora_cache.manifest import (
    CONFIG_FILE,
    FILES,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    check_config,
)
from lora_cache.sources.base import Body, Remote, RemoteFile, RemoteSource
from lora_cache.sources.patience import Patience
from lora_cache.store.digest import is_promised, new_digest
from lora_cache.store.files import disk_error, errors_of
from lora_cache.store.origin import ORIGIN_FILE, Origin, OriginFile
from lora_cache.store.store import Store
from lora_cache.threads import start

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_ATTEMPTS = 5  # in a row without a byte of progress
_POLL_S = 0.05
_CHUNK_BYTES = 1 << 20
_REMOVALS = 3  # how often another process may remove what it has just fetched


class FetchCancelledError(Exception):
    """Nobody waits for this fetch any more."""


@dataclass
class Fetch:
    """One fetch, as seen by who wants it.  `cancel` may be called from any thread.

    Attributes:
        done, total: bytes; `total` is 0 until it is known.
        progress: called from the fetching thread after each piece.
        throttle: called with a number of bytes before they are written; may sleep.
    """

    remote: Remote
    source: RemoteSource
    progress: Callable[[Fetch], None] = lambda _: None
    throttle: Callable[[int, threading.Event], None] = lambda _, __: None
    done: int = 0
    total: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)
    _body: Body | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """End it at once; what has arrived is kept for the next time."""
        self._stopped.set()
        with self._lock:
            if self._body is not None:
                self._body.close()

    def check(self) -> None:
        """Raise if it was cancelled."""
        if self._stopped.is_set():
            raise FetchCancelledError(f"the fetch of {self.remote.key} was cancelled")

    def advance(self, done: int) -> None:
        """Report progress; what must be fetched once more is not reported twice."""
        if done > self.done:
            self.done = done
            self.progress(self)

    def pause(self, seconds: float) -> None:
        """Sleep, or be cancelled."""
        self._stopped.wait(seconds)
        self.check()

    def run(self, store: Store) -> Adapter:
        """Do it.  Blocking.

        Raises:
            AdapterError: what came is no adapter, not what the source promised, or too large.
            SourceError: the source failed again and again.
            StoreError: the disk is full or broken.
            FetchCancelledError: see `cancel`.
        """
        for _ in range(_REMOVALS):
            with store.partial(self.remote.key, self.check) as partial:
                if partial is not None:
                    with self._naming(partial):
                        return self._into(partial, store)
            if (adapter := store.find(self.remote.key)) is not None:
                return adapter
        raise StoreError(
            f"{self.remote.key} is in {store.root}, but damaged or about to be removed, and other "
            "processes still use it: try again when they are done"
        )

    def _into(self, partial: Path, store: Store) -> Adapter:
        config, weights = self._listed()
        origin = self._origin(config, weights)
        with errors_of(partial):
            for stranger in set(os.listdir(partial)) - {*origin.files, ORIGIN_FILE}:
                with suppress(OSError):
                    os.unlink(partial / stranger)
        _FileFetch(self, partial / config.name, config, base=0).run()
        check_config(partial)  # before others make room, and weights come, for nothing
        store.reserve(partial, origin)
        _FileFetch(self, partial / weights.name, weights, base=config.nbytes).run()
        self.check()
        return store.publish(partial, origin)

    @contextmanager
    def _naming(self, partial: Path) -> Iterator[None]:
        """Have errors name what was asked for, not a directory that nobody knows."""
        try:
            yield
        except (InvalidAdapterError, UnsupportedAdapterError) as error:
            said = str(error).replace(str(partial), self.remote.location)
            raise type(error)(said, key=self.remote.key) from error.__cause__

    def _origin(self, *files: RemoteFile) -> Origin:
        remote = self.remote
        return Origin(
            digest=remote.key.digest,
            name=remote.key.name,
            source=remote.ref.source,
            location=remote.ref.location,
            revision=remote.ref.revision,
            files={f.name: OriginFile(nbytes=f.nbytes, digest=f.digest) for f in files},
            fetched=time.time(),
        )

    def _listed(self) -> tuple[RemoteFile, RemoteFile]:
        """Configuration and weights."""
        listed = self._call(self.source.files, self.remote)
        with self.errors():
            files = {file.name: file for file in listed}
        if files.keys() != set(FILES):
            raise InvalidAdapterError(f"{self.remote.location} offers other files than {FILES}")
        config, weights = files[CONFIG_FILE], files[WEIGHTS_FILE]
        if config.nbytes > MAX_CONFIG_BYTES:
            raise InvalidAdapterError(f"{self.remote.location}: its {CONFIG_FILE} is too large")
        self.total = config.nbytes + weights.nbytes
        if self.total > self.source.max_bytes:
            raise UnsupportedAdapterError(
                f"{self.remote.location} has {self.total} bytes, and at most "
                f"{self.source.max_bytes} are fetched: raise max_bytes of the source",
                key=self.remote.key,
            )
        return config, weights

    def _call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a method of the source, which may hang; being cancelled is not to wait for it."""
        self.check()
        future = start(function, *args, **kwargs)
        try:
            while not wait([future], _POLL_S).done:
                self.check()
        except FetchCancelledError:
            future.add_done_callback(_close_late)
            raise
        with self.errors():
            return future.result()

    def pieces(self, body: Body) -> Iterator[bytes]:
        """What `body` yields; its errors, but none of who uses the pieces."""
        with self.errors():
            source = iter(body)
        while True:
            with self.errors():
                piece = next(source, None)
                if piece is None:
                    return
                piece = bytes(piece)
            yield piece

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Of a source that breaks its contract: still one clear error."""
        try:
            yield
        except (LoraCacheError, FetchCancelledError):
            raise
        except Exception as error:
            name = self.remote.ref.source
            raise SourceError(f"{self.remote.ref}: the source {name!r} failed: {error}") from error

    def open(self, file: RemoteFile, offset: int) -> Body:
        """Begin to read; from now on `cancel` closes what is read."""
        body = self._call(self.source.open, self.remote, file, offset)
        with self._lock:
            self._body = body
        if self._stopped.is_set():
            body.close()
            self.check()
        return body

    def close(self) -> None:
        with self._lock:
            body, self._body = self._body, None
        if body is not None:
            body.close()


class _FileFetch:
    """One file of a fetch."""

    def __init__(self, fetch: Fetch, path: Path, file: RemoteFile, base: int) -> None:
        self._fetch = fetch
        self._path = path
        self._file = file
        self._base = base  # bytes of the files before this one
        self._digest = new_digest(file.digest, file.nbytes)
        self._hashed = 0  # how many bytes `_digest` has seen

    def run(self) -> None:
        """Have the whole, verified file at `path`."""
        patience, damaged, most = Patience(_ATTEMPTS), False, self._size()
        while True:
            try:
                if (before := self._size()) < self._file.nbytes or before == 0:
                    self._receive(before)
                if self._is_as_promised():
                    return
                self._discard()
                if damaged:
                    raise InvalidAdapterError(
                        f"{self._fetch.remote.location} sends another {self._file.name} than it "
                        "promises (size or digest differ): ask its owners to upload it again"
                    )
                damaged = True
            except SourceError as error:
                self._fetch.check()
                # Without Range each attempt begins anew, so progress is what was never reached.
                pause_s = patience.pause_after(error, progress=self._size() > most)
                most = max(most, self._size())
                logger.info("%s; trying again in %.1f s", error, pause_s)
                self._fetch.pause(pause_s)
            except OSError as error:
                self._discard()  # what is there helps nobody, and others need the room
                raise disk_error(self._path, error) from error

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def _receive(self, offset: int) -> None:
        """Append what is missing, as far as it comes."""
        fetch, limit = self._fetch, self._file.nbytes
        body = fetch.open(self._file, offset)
        try:
            if body.offset not in (0, offset):
                raise SourceError(f"{self._file.name}: another part came than was asked for")
            with open(self._path, "r+b" if body.offset else "wb") as out:
                self._catch_up(body.offset)
                out.seek(body.offset)
                out.truncate()
                position = body.offset
                for piece in self._fetch.pieces(body):
                    fetch.check()
                    fetch.throttle(len(piece), fetch._stopped)
                    position += len(piece)
                    if position > limit:
                        out.truncate(0)  # not one byte more than was promised reaches the disk
                        return
                    out.write(piece)
                    self._digest.update(piece)
                    self._hashed = position
                    fetch.advance(self._base + position)
            fetch.check()
        finally:
            fetch.close()
        if position < limit:
            raise SourceError(f"the transfer of {self._file.name} broke off after {position} bytes")

    def _catch_up(self, position: int) -> None:
        """Have the digest of the first `position` bytes, which an earlier attempt left."""
        if self._hashed > position:
            self._digest, self._hashed = new_digest(self._file.digest, self._file.nbytes), 0
        if self._hashed < position:
            with open(self._path, "rb") as file:
                file.seek(self._hashed)
                while self._hashed < position and (
                    piece := file.read(min(_CHUNK_BYTES, position - self._hashed))
                ):
                    self._fetch.check()
                    self._digest.update(piece)
                    self._hashed += len(piece)

    def _is_as_promised(self) -> bool:
        size = self._size()
        self._catch_up(size)
        whole = size == self._file.nbytes and is_promised(self._file.digest, self._digest)
        if whole:
            self._fetch.advance(self._base + size)
        return whole

    def _discard(self) -> None:
        with suppress(OSError):
            self._path.unlink()


def _close_late(future: Future[Any]) -> None:
    """Give back a body that came when nobody wanted it any more."""
    if future.exception() is None and hasattr(body := future.result(), "close"):
        body.close()
