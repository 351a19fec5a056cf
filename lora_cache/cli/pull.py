"""``lora-cache pull``: fetch adapters into the store before anybody asks for them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from lora_cache.adapter import Adapter, AdapterRef
from lora_cache.cli.options import JsonOption, StoreOption, parse_size, store_dir
from lora_cache.cli.output import (
    human_bytes,
    make_console,
    make_progress,
    one_line,
    plural,
    print_failures,
    print_json,
    table,
)
from lora_cache.cli.stored import short_key
from lora_cache.errors import DiskFullError, LoraCacheError
from lora_cache.manifest import FILES
from lora_cache.store import DiskTier, Progress

_COLUMNS = ("name", "key", ">size", "", ">seconds", "path")
_AHEAD = 8  # refs that are looked up while others are fetched
_MAX_HELD = 512  # a hold is an open file
_CLOSE_TIMEOUT_S = 1.0
_ROW_KEYS = ("ref", "name", "key", "path", "bytes", "how", "seconds", "error")
_INTERRUPTED = "interrupted: what has arrived is kept"


def pull(
    refs: Annotated[
        list[str] | None,
        typer.Argument(metavar="REF", help="org/name[@revision].", show_default=False),
    ] = None,
    file: Annotated[
        typer.FileText | None,
        typer.Option(metavar="LIST", help="A file with one REF a line (#: a comment); - is stdin."),
    ] = None,
    store: StoreOption = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Budget of the store, like 200GiB."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Adapters at a time.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Fetch adapters into the store.  Exits with 1 if one of them did not come."""
    named = list(dict.fromkeys([*(refs or ()), *_read(file)]))
    if not named:
        raise typer.BadParameter("name an adapter, as org/name[@revision], or give --file")
    disk = DiskTier(store_dir(store), max_bytes=max_bytes, workers=workers)
    run = _Pull(disk, workers)
    with asyncio.Runner() as runner:
        try:
            runner.run(run.everything(named))
        except KeyboardInterrupt:
            _print(run, named, as_json)
            sys.stdout.flush()
            # A thread may be waiting for an answer of the Hub; nobody waits for that thread.
            os._exit(130)
    _print(run, named, as_json)
    if any(row["error"] for row in run.rows.values()):
        raise typer.Exit(1)


def _read(lines: Iterable[str] | None) -> list[str]:
    try:
        stripped = [line.partition(" #")[0].strip() for line in lines or ()]
    except UnicodeDecodeError as error:
        raise typer.BadParameter("the list is not UTF-8 text") from error
    return [line for line in stripped if line and not line.startswith("#")]


@dataclass
class _Pull:
    """What came so far: a row for each ref that is done."""

    disk: DiskTier
    workers: int
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    fetched: set[str] = field(default_factory=set)
    holds: list[Any] = field(default_factory=list)

    async def everything(self, refs: list[str]) -> None:
        # Slow to import; not to be counted as the first adapter's seconds.
        import huggingface_hub.hf_api  # noqa: F401
        import requests  # noqa: F401

        from lora_cache.catalog import Catalog
        from lora_cache.sources import default_sources

        self._catalog = Catalog(default_sources(), self.disk)
        self._turns = asyncio.Semaphore(self.workers + _AHEAD)
        try:
            with _Bars(len(refs)) as self._bars:
                await asyncio.gather(*map(self._one, refs))
        finally:
            for hold in self.holds:
                hold.release()
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self.disk.close()

    async def _one(self, text: str) -> None:
        def advanced(progress: Progress) -> None:
            self.fetched.add(text)
            self._bars.advance(text, progress)

        async with self._turns:
            row: dict[str, Any] = {"ref": text, "error": None}
            began = time.perf_counter()
            try:
                adapter = await self._catalog.resolve(AdapterRef.parse(text), progress=advanced)
                self._keep(adapter)
                row |= self._describe(text, adapter)
            except LoraCacheError as error:
                row["error"] = str(error)
            row["seconds"] = round(time.perf_counter() - began, 3)
            self.rows[text] = row
            self._bars.done(text)

    def _keep(self, adapter: Adapter) -> None:
        """What came must not make room for what comes later in the same command."""
        store = self.disk.store
        if store.max_bytes is None or len(self.holds) >= _MAX_HELD:
            return
        hold = store.hold(adapter)
        if hold is None:
            raise DiskFullError(f"{adapter.key} was removed again: raise --max-bytes")
        self.holds.append(hold)

    def _describe(self, text: str, adapter: Adapter) -> dict[str, Any]:
        here = adapter.path.parent.parent == self.disk.store.root
        how = "fetched" if text in self.fetched else "was here"
        return {
            "name": adapter.key.name,
            "key": adapter.key.digest,
            "path": str(adapter.path),
            "bytes": sum((adapter.path / name).stat().st_size for name in FILES),
            "how": how if here else "in place",
        }


class _Bars:
    """A line for each adapter that is being fetched, and one for all; none without a terminal."""

    def __init__(self, adapters: int) -> None:
        from rich.progress import BarColumn, TextColumn

        self._bars = make_progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
        )
        self._adapters = adapters
        self._finished = 0
        self._nbytes: dict[str, int] = {}
        self._tasks: dict[str, Any] = {}
        self._began = time.monotonic()

    def __enter__(self) -> _Bars:
        self._bars.start()
        self._total = self._bars.add_task("all", total=self._adapters, shown=self._shown())
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, ref: str, progress: Progress) -> None:
        if self._bars.disable:
            return
        if ref not in self._tasks:
            self._tasks[ref] = self._bars.add_task(one_line(ref), shown="")
        self._nbytes[ref] = progress.done
        shown = f"{human_bytes(progress.done)} of {human_bytes(progress.total)}"
        self._bars.update(
            self._tasks[ref], completed=progress.done, total=progress.total, shown=shown
        )
        self._bars.update(self._total, shown=self._shown())

    def done(self, ref: str) -> None:
        self._finished += 1
        if (task := self._tasks.pop(ref, None)) is not None:
            self._bars.remove_task(task)
        self._bars.update(self._total, completed=self._finished, shown=self._shown())

    def _shown(self) -> str:
        nbytes = sum(self._nbytes.values())
        rate = human_bytes(int(nbytes / max(0.1, time.monotonic() - self._began)))
        adapters = plural(self._adapters, "adapter")
        return f"{self._finished} of {adapters}, {human_bytes(nbytes)}, {rate}/s"


def _print(run: _Pull, named: list[str], as_json: bool) -> None:
    rows = [run.rows.get(ref, {"ref": ref, "error": _INTERRUPTED}) for ref in named]
    if as_json:
        print_json([dict.fromkeys(_ROW_KEYS) | row for row in rows])
        return
    console = make_console()
    good = [row for row in rows if not row["error"]]
    if good:
        console.print(table(_COLUMNS, map(_cells, good)))
    print_failures(console, ((row["ref"], row["error"]) for row in rows if row["error"]))
    fetched = [row for row in good if row["how"] == "fetched"]
    nbytes = human_bytes(sum(row["bytes"] for row in fetched))
    failed = f", {len(rows) - len(good)} did not come" if len(good) < len(rows) else ""
    console.print(f"{plural(len(fetched), 'adapter')} fetched, {nbytes}{failed}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        short_key(row["key"]),
        human_bytes(row["bytes"]),
        row["how"],
        f"{row['seconds']:.1f}",
        row["path"],
    )
