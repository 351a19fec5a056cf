"""``lora-cache ls``: the adapters in the store, or in some directories; what is wrong with them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cache.adapter import AdapterRef
from lora_cache.cli.options import JsonOption, StoreOption, store_dir
from lora_cache.cli.output import (
    human_bytes,
    human_seconds,
    make_console,
    plural,
    print_failures,
    print_json,
    table,
)
from lora_cache.cli.stored import describe, short_key, where_from
from lora_cache.errors import AdapterNotFoundError, LoraCacheError
from lora_cache.manifest import CONFIG_FILE
from lora_cache.sources import LocalSource
from lora_cache.store import Store

_STORE_COLUMNS = ("name", ">rank", ">size", ">last used", "in use", "from", "key")
_COLUMNS = ("name", ">rank", ">alpha", "targets", "dtype", ">size", "base model", "key")


def ls(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR",
            help="Adapters, or directories of adapters; without any, what is in the store.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List adapters in the store or in directories.  Exits with 1 if one of them is broken."""
    if directories and store is not None:
        raise typer.BadParameter("give directories, or --store: not both")
    rows = _in_directories(directories) if directories else _in_store(store_dir(store))
    if as_json:
        print_json(rows)
    elif directories:
        _print(rows)
    else:
        _print_store(store_dir(store), rows)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


# ---------------------------------------------------------------------- the store


def _in_store(root: Path) -> list[dict[str, Any]]:
    """What was used last comes first."""
    store = Store(root)
    try:
        return [describe(entry) for entry in reversed(store.entries())]
    finally:
        store.close()


def _print_store(root: Path, rows: list[dict[str, Any]]) -> None:
    console = make_console()
    if not rows:
        typer.echo(f"nothing in {root}")
        return
    good = [row for row in rows if not row["error"]]
    if good:
        console.print(table(_STORE_COLUMNS, map(_store_cells, good)))
    print_failures(console, ((row["name"], row["error"]) for row in rows if row["error"]))
    total = sum(row["bytes"] for row in rows if row["complete"])
    whole = sum(row["complete"] for row in rows)
    console.print(f"{plural(whole, 'adapter')}, {human_bytes(total)}, in {root}")


def _store_cells(row: dict[str, Any]) -> tuple[str, ...]:
    in_use = "yes" if row["in_use"] else ""
    if not row["complete"]:
        in_use = "being fetched" if row["in_use"] else "broken off"
    return (
        row["name"],
        str(row["rank"] or ""),
        human_bytes(row["bytes"]),
        f"{human_seconds(max(0.0, time.time() - row['last_used']))} ago",
        in_use,
        where_from(row),
        short_key(row["key"]),
    )


# ---------------------------------------------------------------------- directories


def _in_directories(directories: list[Path]) -> list[dict[str, Any]]:
    source = LocalSource()
    return [_describe(source, path) for given in directories for path in _adapters(given)]


def _adapters(given: Path) -> list[Path]:
    """`given` if it is an adapter, or else those of its children that are, or that try to be."""
    if _looks_like_adapter(given):
        return [given]
    try:
        return sorted(path for path in given.iterdir() if _looks_like_adapter(path))
    except OSError as error:
        raise AdapterNotFoundError(f"{given}: {error.strerror}") from error


def _looks_like_adapter(path: Path) -> bool:
    try:
        return (path / CONFIG_FILE).exists() or any(path.glob("adapter_model.*"))
    except OSError:
        return False


def _describe(source: LocalSource, path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": path.resolve().name, "path": str(path.absolute())}
    try:
        adapter = source.resolve(AdapterRef.local(path))
    except LoraCacheError as error:
        return {**row, "error": str(error)}
    manifest = adapter.manifest
    return {
        **row,
        "name": adapter.key.name,
        "key": adapter.key.digest,
        "rank": manifest.rank,
        "alpha": manifest.alpha,
        "scaling": manifest.scaling,
        "target_modules": list(manifest.target_modules),
        "dtypes": list(manifest.dtypes),
        "bytes": manifest.nbytes,
        "base_model": manifest.base_model,
        "error": None,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    if not rows:
        typer.echo("no adapters here")
        return
    console = make_console()
    good = [row for row in rows if not row["error"]]
    if good:
        console.print(table(_COLUMNS, map(_cells, good)))
    print_failures(console, ((row["name"], row["error"]) for row in rows if row["error"]))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        str(row["rank"]),
        f"{row['alpha']:g}",
        " ".join(row["target_modules"]),
        " ".join(row["dtypes"]).lower(),
        human_bytes(row["bytes"]),
        row["base_model"] or "",
        row["key"].rpartition(":")[2][:12],
    )
