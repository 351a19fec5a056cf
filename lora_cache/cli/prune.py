"""``lora-cache prune``: make room in the store, and say what for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cache.cli.options import (
    JsonOption,
    StoreOption,
    parse_duration,
    parse_size,
    store_dir,
)
from lora_cache.cli.output import (
    human_bytes,
    human_seconds,
    make_console,
    plural,
    print_json,
    table,
)
from lora_cache.cli.stored import short_key
from lora_cache.store import Entry, Store

_COLUMNS = ("name", ">size", ">last used", "why", "", "key")


@dataclass(frozen=True, slots=True)
class _Wish:
    """What shall go, beside what is good for nothing."""

    max_bytes: int | None
    unused_for_s: float | None
    everything: bool

    @property
    def is_none(self) -> bool:
        return self.max_bytes is None and self.unused_for_s is None and not self.everything


def prune(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Only say what would go.")
    ] = False,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="Until the rest is no more than 50GiB, say."
        ),
    ] = None,
    unused_for: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration, metavar="TIME", help="What was not used for 30d, 12h, 90m."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove adapters from the store, those unused for longest first.

    What some process uses stays.  Without a criterion only what is left of broken-off fetches goes.
    """
    wish = _Wish(max_bytes, unused_for, everything)
    root = store_dir(store)
    opened = Store(root)
    try:
        rows = list(_prune(opened, wish, dry_run))
    finally:
        opened.close()
    if as_json:
        print_json(rows)
    else:
        _print(rows, root, wish, dry_run)


def _prune(store: Store, wish: _Wish, dry_run: bool) -> Iterator[dict[str, Any]]:
    if nbytes := _nbytes_in(store.root / "trash"):
        yield _row("(trash)", None, nbytes, time.time(), "half removed", removed=True)
    entries = store.entries()  # this empties the trash
    for entry, reason in _chosen(entries, wish):
        row = entry.row
        nbytes = _nbytes_in(entry.path) if row.partial else row.nbytes
        removed = not entry.in_use
        if removed and not dry_run:
            removed = bool(store.remove([row])) or not entry.path.is_dir()
        yield _row(row.name, row.digest or None, nbytes, row.used, reason, removed)


def _chosen(entries: list[Entry], wish: _Wish) -> Iterator[tuple[Entry, str]]:
    """Who shall go, and why; what is in use is named, too, where it is in the way."""
    excess = 0
    if wish.max_bytes is not None:
        excess = sum(entry.row.nbytes for entry in entries) - wish.max_bytes
    now = time.time()
    for entry in sorted(entries, key=lambda entry: not entry.row.partial):
        row, reason = entry.row, None
        if row.partial:
            reason = "broken off" if not entry.in_use else None
        elif wish.everything:
            reason = "--all"
        elif wish.unused_for_s is not None and now - row.used > wish.unused_for_s:
            reason = "unused"
        elif excess > 0:
            reason = "over the budget"
        if reason is not None:
            yield entry, reason
            excess -= 0 if entry.in_use else row.nbytes


def _row(
    name: str, key: str | None, nbytes: int, used: float, reason: str, removed: bool
) -> dict[str, Any]:
    return {
        "name": name,
        "key": key,
        "bytes": nbytes,
        "last_used": used,
        "reason": reason,
        "removed": removed,
    }


def _nbytes_in(directory: Path) -> int:
    try:
        return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())
    except OSError:  # it is just being removed
        return 0


def _print(rows: list[dict[str, Any]], root: Path, wish: _Wish, dry_run: bool) -> None:
    console = make_console()
    if rows:
        console.print(table(_COLUMNS, (_cells(row, dry_run) for row in rows)))
    nbytes = human_bytes(sum(row["bytes"] for row in rows if row["removed"]))
    kept = sum(not row["removed"] for row in rows)
    what = "would be free" if dry_run else "are free"
    staying = f"; {plural(kept, 'adapter')} in use" if kept else ""
    console.print(f"{nbytes} {what} in {root}{staying}")
    if wish.is_none:
        console.print(
            "to remove adapters, too: --unused-for 30d, --max-bytes 50GiB, or --all (see --dry-run)"
        )


def _cells(row: dict[str, Any], dry_run: bool) -> tuple[str, ...]:
    fate = "would go" if dry_run else "gone"
    return (
        row["name"],
        human_bytes(row["bytes"]),
        f"{human_seconds(max(0.0, time.time() - row['last_used']))} ago",
        row["reason"],
        fate if row["removed"] else "stays: in use",
        short_key(row["key"]),
    )
