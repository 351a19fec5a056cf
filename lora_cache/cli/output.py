"""How every command prints: JSON, tables, sizes, errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from lora_cache.errors import LoraCacheError

_PIPED_WIDTH = 200  # whatever reads a pipe wants whole lines


class Commands(TyperGroup):
    """Commands whose errors are one line on stderr, and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraCacheError as error:
            typer.echo(f"error: {one_line(str(error))}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


def make_console() -> Console:
    """A console on stdout that takes text as it is: names may look like markup."""
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def make_progress(*columns: Any) -> Any:
    """A `rich.progress.Progress` on stderr, which shows nothing if that is no terminal."""
    from rich.progress import Progress

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr, for people, that goes when the work is done; told how much has been done."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with make_progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(title[-40:], total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_failures(console: Console, failures: Iterable[tuple[str, str]]) -> None:
    """Print a line for each: what it concerns, and what is wrong."""
    for name, error in failures:
        line = Text(f"{one_line(name)}: ", style="bold red")
        console.print(line.append(one_line(error), style="not bold"))


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """``2, "adapter"`` → ``2 adapters``."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def print_json(value: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2))


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], **options: Any) -> Table:
    """Make a plain table; a column whose name starts with ``>`` is aligned to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", **options)
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    for row in rows:
        made.add_row(*(Text(one_line(c)) if isinstance(c, str) else c for c in row))
    return made


def one_line(text: str) -> str:
    """`text` without anything that a terminal would obey: file names can contain all of it."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split("\n")))


def human_bytes(number: int) -> str:
    """``1536`` → ``1.5 KiB``."""
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """``75`` → ``1 min``."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
