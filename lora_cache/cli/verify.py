"""``lora-cache verify``: whether what is in the store is still what its source promised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cache.cli.options import JsonOption, StoreOption, store_dir
from lora_cache.cli.output import (
    human_bytes,
    make_console,
    make_progress,
    plural,
    print_failures,
    print_json,
)
from lora_cache.store import Entry, Store

_DELETED, _IN_USE = "it is deleted", "it stays, because it is in use"


def verify(
    store: StoreOption = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is damaged, so that it is fetched anew.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every adapter in the store: size, digest, header.  Exits with 1 if one is damaged."""
    root = store_dir(store)
    rows = _verify(root, delete)
    damaged = [row for row in rows if row["error"]]
    if as_json:
        print_json(rows)
    else:
        console = make_console()
        print_failures(console, ((row["name"], _words(row, delete)) for row in damaged))
        nbytes = human_bytes(sum(row["bytes"] for row in rows))
        found = f"{len(damaged)} damaged" if damaged else "all are whole"
        console.print(f"{plural(len(rows), 'adapter')}, {nbytes}, in {root}: {found}")
    if damaged:
        raise typer.Exit(1)


def _verify(root: Path, delete: bool) -> list[dict[str, Any]]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    store = Store(root)
    try:
        entries = [entry for entry in store.entries() if not entry.row.partial]
        columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        rows = []
        with make_progress(*columns) as progress:
            task = progress.add_task("", total=sum(entry.row.nbytes for entry in entries))
            for entry in entries:
                error = store.verify(entry.row)
                progress.advance(task, entry.row.nbytes)
                if error is None or entry.path.is_dir():  # not removed by somebody meanwhile
                    rows.append(_row(store, entry, error, delete))
        return rows
    finally:
        store.close()


def _row(store: Store, entry: Entry, error: str | None, delete: bool) -> dict[str, Any]:
    deleted = delete and error is not None and bool(store.remove([entry.row]))
    return {
        "name": entry.row.name,
        "key": entry.row.digest,
        "path": str(entry.path),
        "bytes": entry.row.nbytes,
        "error": error,
        "deleted": deleted,
    }


def _words(row: dict[str, Any], delete: bool) -> str:
    if not delete:
        return str(row["error"])
    return f"{_DELETED if row['deleted'] else _IN_USE}: {row['error']}"
