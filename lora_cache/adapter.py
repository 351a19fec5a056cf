"""What a user names (a ref), what it is (a key), and what was found on disk (an adapter)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_cache.errors import AdapterNotFoundError, InvalidAdapterError
from lora_cache.key import AdapterKey
from lora_cache.manifest import Manifest, Stamp, read_stamp

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$", re.ASCII)
_REVISION = re.compile(r"^[A-Za-z0-9][\w./-]{0,254}$", re.ASCII)
_SCHEME = re.compile(r"^(?!https?:)(?P<source>[a-z][a-z0-9_-]{0,31})://(?P<location>.+)$", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _is_path(text: str) -> bool:
    """No control characters, and nothing that the file system cannot encode."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return not _CONTROL.search(text)


def _fspath(text: object) -> object:
    return os.fspath(text) if isinstance(text, os.PathLike) else text


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a user names.  Refs are cheap, hashable and never touch the disk.

    Attributes:
        source: the name of the source that resolves it, ``"local"`` or ``"hub"``.
        location: a directory, or ``org/name``.
        revision: branch, tag or commit on the Hub; None for the default, and for directories.
    """

    source: str
    location: str
    revision: str | None = None

    @classmethod
    def local(cls, path: str | os.PathLike[str]) -> AdapterRef:
        """An adapter directory on this machine; ``~`` and relative paths are made absolute.

        Raises:
            InvalidAdapterError: the path is empty or contains control characters.
        """
        text = os.fspath(path)
        if not text or not _is_path(text):
            raise InvalidAdapterError(f"{text!r} is not a usable path: give an adapter directory")
        return cls("local", os.path.abspath(os.path.expanduser(text)))

    @classmethod
    def hub(cls, repo_id: str, revision: str | None = None) -> AdapterRef:
        """An adapter on the Hugging Face Hub, ``org/name``.

        Raises:
            InvalidAdapterError: `repo_id` or `revision` is not of the Hub's form.
        """
        if not _HUB_ID.fullmatch(repo_id) or ".." in repo_id:
            raise InvalidAdapterError(f"{repo_id!r} is not a Hub repository: write org/name")
        if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise InvalidAdapterError(
                f"{revision!r} is not a revision: give a branch, tag or commit"
            )
        return cls("hub", repo_id, revision)

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> AdapterRef:
        """Read a ref as a person writes it.

        A path that exists, or that starts like one (``/``, ``./``, ``../``, ``~``), is a local
        directory; ``org/name`` and ``org/name@revision`` are the Hub; ``name://location`` is
        another source's.

        Whether something lies there is found out when the ref is resolved.

        Raises:
            InvalidAdapterError: it is malformed.
            AdapterNotFoundError: it is neither of these forms, nor a directory here.
        """
        if not isinstance(raw := _fspath(text), str):
            raise InvalidAdapterError(
                f"a {type(text).__name__} names no adapter: give a path, org/name[@revision] or an "
                "AdapterRef"
            )
        if isinstance(text, os.PathLike) or raw.startswith(("/", "./", "../", "~")):
            return cls.local(raw)
        if _is_path(raw) and os.path.isdir(raw):
            return cls.local(raw)
        if (other := _SCHEME.fullmatch(raw)) and _is_path(raw):
            return cls(other["source"], other["location"])
        repo_id, at, revision = raw.partition("@")
        if _HUB_ID.fullmatch(repo_id):
            if at and not revision:
                raise InvalidAdapterError(
                    f"{raw!r} names no revision: give a branch, tag or commit after the @"
                )
            return cls.hub(repo_id, revision if at else None)
        if not raw or not _is_path(raw):
            raise InvalidAdapterError(f"{raw!r} is neither a path nor org/name[@revision]")
        raise AdapterNotFoundError(
            f"{raw!r} is neither a directory here nor of the form org/name[@revision]"
        )

    def __str__(self) -> str:
        return f"{self.location}@{self.revision}" if self.revision else self.location


#: How a caller may name an adapter.
AdapterLike = AdapterRef | str | os.PathLike[str]


def as_ref(adapter: AdapterLike) -> AdapterRef:
    """What a caller named, as a ref; raises as `AdapterRef.parse`."""
    return adapter if isinstance(adapter, AdapterRef) else AdapterRef.parse(adapter)


def several(adapters: AdapterLike | Iterable[AdapterLike]) -> list[AdapterLike]:
    """What a caller named, one adapter or several.

    Raises:
        InvalidAdapterError: it is neither.
    """
    if isinstance(adapters, str | os.PathLike | AdapterRef):  # a str is an Iterable[str], too
        return [adapters]
    if not isinstance(adapters, Iterable):
        as_ref(adapters)  # says what is wrong with it
    return list(adapters)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A resolved adapter: its files were found, read and are those that `key` names.

    Attributes:
        path: the canonical, absolute directory; vLLM is given exactly this path.
        stamp: identity of the files when they were read; empty for files that cannot change.
    """

    key: AdapterKey
    path: Path
    manifest: Manifest
    stamp: Stamp = ()

    @property
    def nbytes(self) -> int:
        """True bytes of the weights."""
        return self.manifest.nbytes

    def is_unchanged(self) -> bool:
        """Whether the files are still those that were read.  Two `stat` calls."""
        try:
            return not self.stamp or read_stamp(self.path) == self.stamp
        except AdapterNotFoundError:
            return False


__all__ = ["Adapter", "AdapterKey", "AdapterRef"]
