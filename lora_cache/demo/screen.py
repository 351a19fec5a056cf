"""What `lora-cache demo` shows: a live screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_cache.demo.catalogue import ADAPTERS
from lora_cache.demo.run import Exchange, Progress
from lora_cache.state import CopyState, Tier
from lora_cache.views import AdapterStatus, Snapshot, Stats

_COLOURS = dict(zip(ADAPTERS, ("red", "yellow", "cyan", "blue", "green", "magenta"), strict=True))
_FOUND = {Tier.GPU: ("slot", "green"), Tier.HOST: ("host", "yellow"), Tier.DISK: ("disk", "red")}
_PICTURE_WIDTH = 110
_FRAMES_PER_S = 8
_LIVE_ROWS = 6


# ---------------------------------------------------------------------- parts of the screen


def tiers(snapshot: Snapshot) -> RenderableType:
    """Who is where: slots, host memory, disk."""
    slotted = {row.slot: row for row in snapshot.adapters if row.slot is not None}
    hosted = [row for row in snapshot.adapters if row.host is not None and row.slot is None]
    near = {row.name for row in (*slotted.values(), *hosted)}
    slots = Table.grid(padding=(0, 2, 0, 0), expand=True)
    slots.add_column(style="dim")
    slots.add_column(ratio=1)
    slots.add_column(justify="right", style="dim", no_wrap=True)
    for index in range(snapshot.slots):
        slots.add_row(f"slot {index}", *_occupant(slotted.get(index)))
    panels = Table.grid(expand=True)
    for ratio in (5, 3, 5):
        panels.add_column(ratio=ratio)
    panels.add_row(
        _panel("slots", slots),
        _panel("host memory", _names((_label(row) for row in hosted), 2)),
        _panel("disk", _names((_name(name) for name in ADAPTERS if name not in near), 3)),
    )
    return panels


def counts(progress: Progress, stats: Stats) -> RenderableType:
    """How far the demo is, and what the cache has counted."""
    line = Text("  ")
    for name, number, style in (
        ("slot hits", stats.slot_hits, "green"),
        ("host hits", stats.host_hits, "yellow"),
        ("disk hits", stats.disk_hits, "red"),
        ("evictions", stats.evictions, "bold"),
    ):
        line.append(f"{number}", style=f"bold {style}").append(f" {name}   ", style="dim")
    done = sum(exchange.finished for exchange in progress.exchanges)
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(ratio=1)
    row.add_column(justify="right")
    row.add_column()
    bar = ProgressBar(total=progress.requests, completed=done, complete_style="green")
    row.add_row(bar, f"{done}/{progress.requests} requests", line)
    return Padding(row, (0, 1))


def conversation(exchanges: Sequence[Exchange]) -> RenderableType:
    """Requests as they come in, the base model's answer beside the adapter's."""
    made = _table("adapter", "from", "question", "answer", "the base model's answer")
    for column, ratio in zip(made.columns, (9, 6, 22, 44, 24), strict=True):
        column.ratio, column.no_wrap = ratio, True  # one line each: the screen must not jump
    for exchange in exchanges:
        made.add_row(
            _name(exchange.adapter),
            _found(exchange.found),
            _line(exchange.prompt),
            _line(exchange.text + ("" if exchange.finished else " …")),
            _line(exchange.base_text, style="dim"),
        )
    return made


def answers(exchanges: Sequence[Exchange]) -> RenderableType:
    """One answer of each adapter, with what the adapter was trained for."""
    made = _table("adapter", "question", "its answer", "the base model's answer", leading=1)
    for column, ratio in zip(made.columns, (26, 18, 38, 28), strict=True):
        column.ratio = ratio
    for name, recipe in ADAPTERS.items():
        shown = next((e for e in exchanges if e.adapter == name and e.finished), None)
        if shown is not None:
            made.add_row(
                Text.assemble(_name(name), (f"\n{recipe.headline}", "dim")),
                Text(shown.prompt),
                _short(shown.text, 150),
                _short(shown.base_text, 70, style="dim"),
            )
    return made


def summary(progress: Progress, stats: Stats) -> RenderableType:
    """The numbers that count, in words."""
    found, waits = Text(), Text(style="dim")
    for tier, hits in (
        (Tier.GPU, stats.slot_hits),
        (Tier.HOST, stats.host_hits),
        (Tier.DISK, stats.disk_hits),
    ):
        word, style = _FOUND[tier]
        found.append(f"{hits} {word} hit{'' if hits == 1 else 's'}".ljust(16), f"bold {style}")
        waits.append(_wait(progress.mean_wait_s(tier)).ljust(16))
    moves = Text(
        f"{stats.disk_loads} loads from disk, {stats.activations} activations, "
        f"{stats.gpu_evictions} evictions from slots, {stats.host_evictions} from host memory; "
        f"{_wait(stats.load_s)} in all"
    )
    end = Text(f"{progress.startup_s:.0f} s to start, {progress.serving_s:.0f} s to serve;  ")
    if progress.drift:
        end.append(f"drift {progress.drift}", "bold red").append(": vLLM held something else")
    else:
        end.append("drift 0", "bold green").append(": vLLM holds what the cache says")
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim")
    grid.add_row(f"{stats.requests} requests", found)
    grid.add_row("mean wait", waits.append("for a slot, and for the load"))
    grid.add_row("moves", moves)
    grid.add_row("time", end)
    engine = progress.snapshot.engine if progress.snapshot else ""
    title = f"vLLM {progress.vllm}, {engine} engine, policy {progress.policy}"
    return _panel(title, grid, 4)


def final(progress: Progress) -> RenderableType:
    """The last screen: who is where, an answer of each adapter, the summary."""
    assert progress.snapshot is not None, "the demo has not run"
    assert progress.stats is not None, "the demo has not run"
    return Group(
        tiers(progress.snapshot),
        answers(progress.exchanges),
        summary(progress, progress.stats),
    )


def save_svg(progress: Progress, path: Path) -> None:
    """Draw the last screen into an SVG file that needs no font from elsewhere."""
    console = Console(
        record=True, width=_PICTURE_WIDTH, file=io.StringIO(), force_terminal=True, highlight=False
    )
    console.print(final(progress))
    svg = console.export_svg(title="lora-cache demo")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    path.write_text(svg.replace("Fira Code,", "Fira Code, Menlo, Consolas, DejaVu Sans Mono,"))


# ---------------------------------------------------------------------- views


class SilentView:
    """Shows nothing: for ``--json``."""

    def stage(self, text: str) -> None: ...

    def update(self, progress: Progress) -> None: ...

    def answered(self, exchange: Exchange, progress: Progress) -> None: ...


class PlainView:
    """One line an answer: for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def stage(self, text: str) -> None:
        self._console.print(f"{text} …")

    def update(self, progress: Progress) -> None: ...

    def answered(self, exchange: Exchange, progress: Progress) -> None:
        word, _ = _FOUND[exchange.found or Tier.DISK]
        done = sum(e.finished for e in progress.exchanges)
        text = " ".join(exchange.text.split())
        self._console.print(
            f"{done:3}/{progress.requests}  {exchange.adapter:9}  {word}  "
            f"{exchange.prompt}  {text}",
            soft_wrap=True,
        )


class LiveView:
    """The live screen: for terminals."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # Drawn from the event loop's thread only: a refreshing thread would read a cache that is
        # changing.
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._drawn_at = 0.0

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        self._console.print(Text(f"{text} …", style="dim"))

    def update(self, progress: Progress) -> None:
        now = time.perf_counter()
        if now - self._drawn_at < 1 / _FRAMES_PER_S:
            return
        self._drawn_at = now
        if progress.snapshot is not None and progress.stats is not None:
            begun = [e for e in progress.exchanges if e.text]
            screen = Group(
                tiers(progress.snapshot),
                counts(progress, progress.stats),
                conversation(begun[-_LIVE_ROWS:]),
            )
            self._live.update(screen, refresh=True)

    def answered(self, exchange: Exchange, progress: Progress) -> None: ...


# ---------------------------------------------------------------------- small things


def _name(adapter: str) -> Text:
    return Text(adapter, style=f"bold {_COLOURS.get(adapter, 'white')}")


def _label(row: AdapterStatus) -> Text:
    name = _name(row.name)
    if row.host is CopyState.LOADING:
        name.append(" loads", style="not bold dim")
    return name


def _occupant(row: AdapterStatus | None) -> tuple[Text, str]:
    if row is None:
        return Text("free", style="dim"), ""
    leases = f"{row.leases} lease{'' if row.leases == 1 else 's'}" if row.leases else "idle"
    state = "" if row.gpu in (None, CopyState.READY) else f"{row.gpu}, "
    return _name(row.name), f"{state}{leases}, rank {row.rank}"


def _found(tier: Tier | None) -> Text:
    return Text("") if tier is None else Text(*_FOUND[tier])


def _names(names: Iterable[Text], columns: int) -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
    for _ in range(columns):
        grid.add_column(ratio=1, no_wrap=True)
    listed = list(names) or [Text("empty", style="dim")]
    for i in range(0, len(listed), columns):
        grid.add_row(*listed[i : i + columns])
    return grid


def _panel(title: str, body: RenderableType, lines: int = 2) -> Panel:
    return Panel(
        body,
        title=f"[bold]{title}[/bold]",
        title_align="left",
        border_style="bright_black",
        box=box.ROUNDED,
        height=lines + 2,  # fixed: a screen that jumps is hard to read
    )


def _table(*columns: str, leading: int = 0) -> Table:
    made = Table(
        leading=leading,
        box=box.SIMPLE_HEAD,
        expand=True,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
        border_style="bright_black",
    )
    for name in columns:
        made.add_column(name)
    return made


def _line(text: str, style: str = "") -> Text:
    return Text(" ".join(text.split()), style=style, overflow="ellipsis")


def _short(text: str, length: int, style: str = "") -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= length else f"{line[: length - 1].rstrip()}…", style=style)


def _wait(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
