"""Whether an adapter in the store is whole: quickly, by sizes, or to the last byte."""

from __future__ import annotations

from pathlib import Path

from lora_cache.adapter import Adapter
from lora_cache.errors import AdapterError, AdapterNotFoundError, InvalidAdapterError
from lora_cache.manifest import FILES, read_manifest, read_stamp
from lora_cache.store.digest import is_promised, new_digest
from lora_cache.store.files import folder_of
from lora_cache.store.origin import ORIGIN_FILE, Origin

_CHUNK_BYTES = 1 << 20


def read_origin(path: Path) -> Origin:
    """What the adapter at `path` says of itself, if its files have the sizes that it says.

    Raises:
        InvalidAdapterError: they have not, or it says nothing.
    """
    origin = Origin.read(path)
    if folder_of(origin.key) != path.name or sorted(origin.files) != sorted(FILES):
        raise InvalidAdapterError(f"{path} has an {ORIGIN_FILE} that is not its own")
    for name, file in origin.files.items():
        try:
            nbytes = (path / name).stat().st_size
        except OSError as error:
            raise InvalidAdapterError(f"{path / name} is out of reach: {error.strerror}") from error
        if nbytes != file.nbytes:
            raise InvalidAdapterError(
                f"{path / name} has {nbytes} bytes, and {file.nbytes} were fetched"
            )
    return origin


def read_adapter(path: Path) -> Adapter:
    """The adapter at `path`, without reading its weights.

    Raises:
        AdapterError: it is not whole, or cannot be served.
    """
    origin = read_origin(path)
    return Adapter(origin.key, path, read_manifest(path), read_stamp(path))


def is_whole(path: Path) -> bool:
    """Whether the adapter at `path` is as `read_adapter` wants it."""
    try:
        read_adapter(path)
    except (AdapterNotFoundError, InvalidAdapterError):
        return False
    return True


def fault_of(path: Path) -> str | None:
    """What is wrong with the adapter at `path`, every byte of it read; None if nothing is."""
    try:
        read_adapter(path)
        for name, file in Origin.read(path).files.items():
            made = new_digest(file.digest, file.nbytes)
            with open(path / name, "rb") as content:
                while piece := content.read(_CHUNK_BYTES):
                    made.update(piece)
            if not is_promised(file.digest, made):
                return f"{path / name} is not what was fetched: its digest differs"
    except AdapterError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None
