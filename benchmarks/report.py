"""Raw figures: written beside a table with what they were made with, and read to be drawn."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_cache import __version__


def write_raw(path: Path, script: str, packages: tuple[str, ...], **figures: Any) -> None:
    """Write `figures`, with command, machine and versions, as JSON.

    Args:
        script: the module that made them, as it is run.
        packages: distributions whose versions matter.
    """
    raw = {
        "command": " ".join([f"python -m {script}", *sys.argv[1:]]),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"lora-cache": __version__} | {name: version(name) for name in packages},
        **figures,
    }
    path.write_text(json.dumps(raw, indent=1) + "\n")


def draw_as_asked(draw: Callable[[Any, Path], None], raw: Path, picture: Path) -> None:
    """Draw a raw file, those two or what the command line names instead."""
    given = [Path(argument) for argument in sys.argv[1:]]
    raw, picture = [*given, *(raw, picture)[len(given) :]]
    draw(json.loads(raw.read_text()), picture)
    print(picture)
