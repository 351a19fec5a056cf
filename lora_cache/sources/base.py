"""What the cache needs of a source, and what a source says of an adapter that lies elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef


@dataclass(frozen=True, slots=True)
class Remote:
    """An adapter that was found and is not on this machine, as far as its source knows.

    Attributes:
        key: names content that can never change.
        ref: what was asked for.
        location: where the source finds the content, e.g. ``"org/name@commit"``.
    """

    key: AdapterKey
    ref: AdapterRef
    location: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a `Remote`.

    Attributes:
        name: one of `lora_cache.manifest.FILES`.
        nbytes: its size, in bytes.
        digest: ``"sha256:…"`` or ``"git-sha1:…"`` (of a blob, header included), in hex.
    """

    name: str
    nbytes: int
    digest: str


class Body(Protocol):
    """Bytes of one file, as they arrive."""

    #: Where in the file they begin: a server may send all of it although less was asked for.
    offset: int

    def __iter__(self) -> Iterator[bytes]:
        """Yield them in pieces of at most a few MiB.

        Raises:
            SourceError: the transfer broke off.
        """
        ...

    def close(self) -> None:
        """Give the connection back.  From another thread: make the iteration end at once."""
        ...


class Source(Protocol):
    """Resolves refs of one kind (``ref.source`` names it)."""

    def resolve(self, ref: AdapterRef) -> Adapter | Remote:
        """Find out what `ref` means now.  Blocking; called in a worker thread.

        Returns:
            An adapter whose files were read and validated, or one that must be fetched first
            (then the source is a `RemoteSource`).

        Raises:
            AdapterError: it is missing, malformed, of a kind that cannot be served, or denied.
            SourceError: the source did not answer; trying again may help.
        """
        ...

    def is_current(self, ref: AdapterRef, adapter: Adapter) -> bool:
        """Whether `ref` still means `adapter`.  Called for every request: microseconds, no read."""
        ...


@runtime_checkable
class RemoteSource(Source, Protocol):
    """A source whose adapters are fetched to the disk tier.

    Attributes:
        max_concurrent: files that are fetched from it at a time.
        bytes_per_s: how fast they are fetched in all, or None.
        max_bytes: the largest adapter that is fetched, in bytes.
    """

    max_concurrent: int
    bytes_per_s: float | None
    max_bytes: int

    def files(self, remote: Remote) -> tuple[RemoteFile, ...]:
        """The files of `remote`, those of `lora_cache.manifest.FILES` and no others.  Blocking.

        Raises:
            AdapterError, SourceError: as `resolve`.
        """
        ...

    def open(self, remote: Remote, file: RemoteFile, offset: int) -> Body:
        """Begin to read `file`, from `offset` on.  Blocking.

        Raises:
            AdapterError, SourceError: as `resolve`.
        """
        ...
