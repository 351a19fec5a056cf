"""The adapters that are to be served: those in a directory, or so many of some ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_cache.errors import AdapterError, AdapterNotFoundError, ConfigError
from lora_cache.manifest import CONFIG_FILE, Manifest, read_manifest
from lora_cache.plan.model import Model
from lora_cache.plan.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Adapters:
    """What they are like.

    Attributes:
        ranks: how many have which.
        host_bytes: of one in host memory on average, in the dtype of slots, one copy.
        disk_bytes: of one on disk on average.
        count: how many there are; None if only their ranks are known.
        targets: names of the modules that any of them has weights for; None: not known, taken to
            be all linear layers.
        refused: what could not be read or served, and why.
        is_assumed: nobody said what they are like.
    """

    ranks: Ranks
    host_bytes: int
    disk_bytes: int
    count: int | None = None
    targets: tuple[str, ...] | None = None
    refused: tuple[tuple[str, str], ...] = ()
    is_assumed: bool = False


def of_ranks(ranks: Ranks, model: Model, item_bytes: int) -> Adapters:
    """Adapters of all linear layers, saved in the dtype of slots."""
    nbytes = sum(share * model.adapter_numbers(rank) for rank, share in ranks.shares) * item_bytes
    return Adapters(ranks, round(nbytes), round(nbytes))


def in_directory(directory: Path, item_bytes: int) -> Adapters:
    """Read the manifests of all adapters in `directory` (or of itself, if it is one).

    Args:
        item_bytes: of a number in a slot.

    Raises:
        ConfigError: none can be served.
        AdapterNotFoundError: the directory cannot be read.
    """
    found: list[Manifest] = []
    refused: list[tuple[str, str]] = []
    for path in _adapters(directory):
        try:
            found.append(read_manifest(path))
        except AdapterError as error:
            refused.append((path.name, str(error)))
    if not found:
        why = f": {refused[0][1]}" if refused else ""
        raise ConfigError(f"{directory} holds no adapter that can be served{why}")
    disk = sum(manifest.nbytes for manifest in found)
    host = sum(_numbers(manifest) for manifest in found) * item_bytes
    return Adapters(
        ranks=Ranks.of(manifest.rank for manifest in found),
        host_bytes=round(host / len(found)),
        disk_bytes=round(disk / len(found)),
        count=len(found),
        targets=tuple(sorted({name for manifest in found for name in manifest.target_modules})),
        refused=tuple(refused),
    )


def _adapters(directory: Path) -> Iterator[Path]:
    if (directory / CONFIG_FILE).exists():
        yield directory
        return
    try:
        children = sorted(path for path in directory.iterdir() if path.is_dir())
    except OSError as error:
        raise AdapterNotFoundError(f"{directory}: {error.strerror}") from error
    yield from (path for path in children if (path / CONFIG_FILE).exists())


def _numbers(manifest: Manifest) -> float:
    """How many numbers an adapter has; of several dtypes, as if it had equal parts of each."""
    sizes = [_FILE_ITEM_BYTES.get(dtype, 2) for dtype in manifest.dtypes]
    return manifest.nbytes / (sum(sizes) / len(sizes))


_FILE_ITEM_BYTES = {"F64": 8, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1}
