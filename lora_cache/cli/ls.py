"""``lora-cache ls``: the adapters in some directories, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from lora_cache.adapter import AdapterRef
from lora_cache.cli.output import human_bytes, make_console, one_line, print_json, table
from lora_cache.errors import AdapterNotFoundError, LoraCacheError
from lora_cache.manifest import CONFIG_FILE
from lora_cache.sources import LocalSource

_COLUMNS = ("name", ">rank", ">alpha", "targets", "dtype", ">size", "base model", "key")


def ls(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR]...",
            help="Adapters, or directories of adapters; the demo's adapters if none is given.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects.")] = False,
) -> None:
    """List adapters: rank, targets, size, key.  Exits with 1 if one of them is broken."""
    source = LocalSource()
    found = [path for given in directories or [_demo_adapters()] for path in _adapters(given)]
    rows = [_describe(source, path) for path in found]
    if as_json:
        print_json(rows)
    elif rows:
        _print(rows)
    else:
        typer.echo("no adapters here")
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


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


def _demo_adapters() -> Path:
    from lora_cache.demo.catalogue import ADAPTERS, adapter_dir

    return adapter_dir(next(iter(ADAPTERS))).parent


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
    console = make_console()
    good = [row for row in rows if not row["error"]]
    if good:
        console.print(table(_COLUMNS, (_cells(row) for row in good)))
    for row in rows:
        if row["error"]:
            line = Text(f"{one_line(row['name'])}: ", style="bold red")
            console.print(line.append(one_line(row["error"]), style="not bold"))


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
