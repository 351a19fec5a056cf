"""Options that several commands have, and how what is given for them is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from lora_cache.errors import ConfigError
from lora_cache.paths import cache_home

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(?P<count>\d+(\.\d+)?)(?P<unit>[smhdw])", re.ASCII)


def parse_size(text: str) -> int:
    """``"50GiB"`` → bytes."""
    try:
        nbytes = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError) as error:
        raise typer.BadParameter(f"{text!r} is no size: write 50GiB, 800MB, or bytes") from error
    if nbytes < 0:
        raise typer.BadParameter(f"{text!r} is less than nothing")
    return nbytes


def parse_duration(text: str) -> float:
    """``"30d"`` → seconds."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration: write 30d, 12h, 90m, or 2w")
    return float(found["count"]) * _SECONDS[found["unit"]]


def parse_numbers(option: str, text: str) -> list[int]:
    """``"4,8,16"`` → numbers.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: give numbers, like 4,8,16") from None


StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="The store; by default the one that caches use, in ~/.cache/lora-cache.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a list of JSON objects.")]
EngineOption = Annotated[
    str, typer.Option(metavar="stock|resident", help="Which engine of lora_cache does the loads.")
]
HoldOption = Annotated[
    str,
    typer.Option(
        metavar="none|S|S/token",
        help="How long requests hold their adapter: not at all (and loads take no time), "
        "2.5 (seconds), 0.02/token (of output).",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of traffic that names no seed.")]


def store_dir(given: Path | None) -> Path:
    """Where the store is."""
    return (cache_home() / "store" if given is None else given.expanduser()).absolute()
