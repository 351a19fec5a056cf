"""``lora-cache simulate``: which policy, how many slots?  Replays traffic, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cache.cli.options import (
    EngineOption,
    HoldOption,
    JsonOption,
    SeedOption,
    parse_numbers,
)
from lora_cache.cli.output import (
    counting,
    human_bytes,
    make_console,
    one_line,
    print_json,
    table,
)

if TYPE_CHECKING:
    from lora_cache.sim import Row, Setup, Trace

_TRACES = "CSV or JSONL files (also .gz), or traffic like zipf:adapters=1000,skew=1.0."


def simulate(
    traces: Annotated[list[str], typer.Argument(metavar="TRACE...", help=_TRACES)],
    gpu_slots: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Numbers of GPU slots to try.")
    ] = "8",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="Policies: lru, lfu:half_life_s=inf, belady, …; all there are, if not given.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="N|BYTES",
            help="Host memory: 64 (adapters) or 20GiB; without limit, if not given.",
            show_default=False,
        ),
    ] = None,
    hold: HoldOption = "none",
    engine: EngineOption = "stock",
    adapter_bytes: Annotated[
        str, typer.Option(metavar="BYTES", help="Size of adapters, where the trace has none.")
    ] = "84MB",
    belady: Annotated[
        bool,
        typer.Option(
            "--belady/--no-belady",
            help="Compare with the best there can be. Reads each trace twice.",
        ),
    ] = True,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="SVG|PNG", help="Draw misses over slots.", show_default=False),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            metavar="SVG|PNG",
            help="Draw who was where over time: the first trace, policy and number of slots.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Replay traffic through the policies, and count what each of them misses."""
    from lora_cache.sim import open_trace
    from lora_cache.sim import simulate as run
    from lora_cache.spec import split_specs

    setup = _setup(host, hold, engine, adapter_bytes, belady=belady)
    slots = parse_numbers("--gpu-slots", gpu_slots)
    policies = [name for given in policy or () for name in split_specs(given)]
    opened = [open_trace(text, seed) for text in traces]
    if plot or timeline:
        from lora_cache.sim.plots import check_path

        for path in filter(None, (plot, timeline)):
            check_path(path)
    rows: list[Row] = []
    for trace in opened:
        with counting(trace.name) as progress:
            rows += run(trace, policies, slots, setup, progress)
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        _print(rows)
    if plot:
        from lora_cache.sim.plots import plot_misses

        plot_misses(rows, plot)
    if timeline:
        _draw_timeline(opened[0], rows[0], setup, timeline)


def _setup(host: str | None, hold: str, engine: str, adapter_bytes: str, *, belady: bool) -> Setup:
    from lora_cache.sim import Setup, parse_hold

    entries = nbytes = None
    if host is not None:
        try:
            entries = int(host)
        except ValueError:
            nbytes = _bytes("--host", host)
    return Setup.of_engine(
        engine,
        host_entries=entries,
        host_bytes=nbytes,
        hold=parse_hold(hold),
        nbytes=_bytes("--adapter-bytes", adapter_bytes),
        belady=belady,
    )


def _bytes(option: str, text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from lora_cache.errors import ConfigError

    try:
        number = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        number = 0
    if number < 1:
        raise ConfigError(f"{option} {text}: give bytes, like 20GiB")
    return number


def _draw_timeline(trace: Trace, row: Row, setup: Setup, path: Path) -> None:
    from lora_cache.sim.plots import plot_timeline
    from lora_cache.sim.timeline import record_timeline

    plot_timeline(record_timeline(trace, row.policy, row.gpu_slots, setup), path)


# ---------------------------------------------------------------------- the table


def _print(rows: list[Row]) -> None:
    console = make_console()
    held = any(row.wait_p99_s is not None for row in rows)
    columns = [">slots", "policy", ">misses", ">of LRU→Belady", ">host misses", ">evictions"]
    columns += [">from disk", ">into slots", ">waited"]
    columns += [">p50", ">p99"] if held else []
    for number, trace in enumerate(dict.fromkeys(row.trace for row in rows)):
        mine = [row for row in rows if row.trace == trace]
        first = mine[0]
        title = f"{one_line(trace)}: {first.requests:,} requests for {first.adapters:,} adapters"
        console.print(*([""] if number else []), title, sep="\n")
        before = [None, *mine[:-1]]
        cells = [_cells(row, last, held=held) for last, row in zip(before, mine, strict=True)]
        console.print(table(columns, cells))


def _cells(row: Row, before: Row | None, *, held: bool) -> tuple[str, ...]:
    waits = (row.wait_p50_s, row.wait_p99_s) if held else ()
    return (
        "" if before and before.gpu_slots == row.gpu_slots else str(row.gpu_slots),
        row.policy,
        f"{row.miss_ratio:.2%}",
        "" if row.belady_closed is None else f"{row.belady_closed:.0%}",
        f"{row.host_misses:,}",
        f"{row.evictions:,}",
        human_bytes(row.disk_to_host_bytes),
        human_bytes(row.host_to_slot_bytes),
        f"{row.wait_s:,.0f} s",
        *(f"{wait or 0:.3g} s" for wait in waits),
    )
