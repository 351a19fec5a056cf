"""``lora-cache status``: the caches that run on this machine, and who is where in them."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from lora_cache.cli.output import (
    human_bytes,
    human_seconds,
    make_console,
    one_line,
    plural,
    print_json,
    table,
)
from lora_cache.status import read_status

_EVICTIONS = 3  # to show
_COLUMNS = ("tier", ">slot", "adapter", ">rank", "state", ">leases", ">waiting", "pinned", ">since")


def status(
    memory: Annotated[
        bool,
        typer.Option("--memory", help="What each holds, against what the system reports."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects.")] = False,
) -> None:
    """Show every cache that runs on this machine: slots, host memory, counts."""
    caches = read_status()
    if memory and caches:
        from lora_cache.cli.memory import account, read_gpus

        gpus = read_gpus()
        caches = [cache | {"memory": account(cache, gpus)} for cache in caches]
    if as_json:
        print_json(caches)
    elif caches:
        console = make_console()
        for index, cache in enumerate(caches):
            console.print(*([""] if index else []), _show(cache), sep="\n")
    else:
        typer.echo("no cache is running on this machine")


def _show(cache: dict[str, Any]) -> RenderableType:
    snapshot, now = cache["snapshot"], time.time()
    # `since_s` was true when the file was written; it is written only when something changes.
    aged = now - cache["updated_at"]
    title = Text(f"pid {cache['pid']}", style="bold").append(
        f"  {cache['engine']} engine, policy {snapshot['policy']}, "
        f"for {human_seconds(now - cache['started_at'])}",
        style="not bold",
    )
    resident = table(_COLUMNS, (_row(adapter, aged) for adapter in snapshot["adapters"]))
    body = (
        resident if snapshot["adapters"] else Text("nothing is resident yet"),
        *_lines(cache),
        *_pressure(cache),
        *_evictions(snapshot, aged),
        *_memory(cache),
    )
    return Group(title, Padding(Group(*body), (0, 0, 0, 2), expand=False))


def _row(adapter: dict[str, Any], aged: float) -> tuple[str, ...]:
    return (
        adapter["tier"],
        "" if adapter["slot"] is None else str(adapter["slot"]),
        adapter["name"] or adapter["key"],
        str(adapter["rank"]),
        adapter["gpu"] or adapter["host"] or "wanted",
        str(adapter["leases"]),
        str(adapter["waiting"]),
        adapter["pinned"] or "",
        human_seconds(adapter["since_s"] + aged) if adapter["gpu"] or adapter["host"] else "",
    )


def _memory(cache: dict[str, Any]) -> list[Text]:
    if "memory" not in cache:
        return []
    from lora_cache.cli.memory import show

    return list(show(cache["memory"]))


def _evictions(snapshot: dict[str, Any], aged: float) -> list[Text]:
    """The last ones, newest first."""
    lines = []
    for event in snapshot.get("evictions", ())[:_EVICTIONS]:
        ago = human_seconds(snapshot["at_s"] - event["at_s"] + aged)
        place = "its slot" if event["tier"] == "gpu" else "host memory"
        victim, newcomer, runner_up = (
            event[f"{who}_name"] or event[who] for who in ("victim", "newcomer", "runner_up")
        )
        cause = f"for {newcomer}" if newcomer else "because memory is scarce"
        text = f"{ago} ago {victim} left {place} {cause}: {event['reason']}"
        if runner_up:
            text += f"; next: {runner_up}, {event['runner_up_reason']}"
        lines.append(Text(one_line(text), style="dim"))
    return lines


def _pressure(cache: dict[str, Any]) -> list[Text]:
    """What scarce memory does, or did, to the cache; nothing if that is nothing."""
    stats, memory = cache["stats"], cache["snapshot"].get("memory") or {}
    levels = memory.get("levels") or {}
    scarce = [f"{level} on {name}" for name, level in levels.items() if level != "none"]
    given, prefetches, pins = (
        stats.get(name, 0) for name in ("given_back", "prefetches_refused", "pins_refused")
    )
    if not (scarce or given or prefetches or pins):
        return []
    now = memory.get("host_bytes_now")
    return [
        Text(
            f"memory pressure: {', '.join(scarce) or 'none now'}"
            + ("" if now is None else f", host budget down to {human_bytes(now)}")
            + f"; {plural(given, 'copy', 'copies')} "
            f"({human_bytes(stats.get('given_back_bytes', 0))}) given back, refused "
            f"{plural(prefetches, 'prefetch', 'prefetches')} and {plural(pins, 'pin')}"
        )
    ]


def _lines(cache: dict[str, Any]) -> tuple[Text, Text]:
    stats, snapshot = cache["stats"], cache["snapshot"]
    in_slots = sum(adapter["slot"] is not None for adapter in snapshot["adapters"])
    in_host = sum(adapter["host"] is not None for adapter in snapshot["adapters"])
    budget = snapshot["host_bytes_max"]
    return (
        Text(
            f"slots {in_slots}/{snapshot['slots']}, host memory {in_host}/"
            f"{snapshot['host_entries']} adapters, {human_bytes(snapshot['host_bytes'])}"
            + (f" of {human_bytes(budget)}" if budget else "")
        ),
        Text(
            f"{stats['requests']} requests: {stats['slot_hits']} slot hits, "
            f"{stats['host_hits']} host hits, {stats['disk_hits']} disk hits; "
            f"{stats['evictions']} evictions, {stats['load_failures']} failed loads, "
            f"drift {stats['drift']}"
        ),
    )
