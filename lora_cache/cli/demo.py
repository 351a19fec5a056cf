"""``lora-cache demo``: a real vLLM on this machine's CPU, six adapters, two slots."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cache.cli.output import print_json
from lora_cache.errors import ConfigError

if TYPE_CHECKING:
    from lora_cache.demo.run import Progress

_SEED = 67  # shows slot hits, host hits and disk hits, several of each


def demo(
    requests: Annotated[int, typer.Option(min=1, max=10_000, help="How many requests.")] = 24,
    policy: Annotated[str, typer.Option(help="Who leaves a slot: lru, lfu, …")] = "lru",
    engine: Annotated[
        str, typer.Option(help="resident: loads beside the step loop; stock: vLLM as it is.")
    ] = "resident",
    seed: Annotated[int, typer.Option(help="Which adapters are asked, in which order.")] = _SEED,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    svg: Annotated[Path | None, typer.Option(hidden=True, help="Draw the last screen.")] = None,
) -> None:
    """Serve six adapters from two slots with a real vLLM, on the CPU, and watch them move."""
    from lora_cache.demo.screen import save_svg

    if engine not in ("resident", "stock"):
        raise ConfigError(f"--engine {engine}: choose resident or stock")
    progress = _run(requests, policy, seed, engine, as_json=as_json)
    if as_json:
        print_json(progress.to_dict())
    if svg is not None:
        save_svg(progress, svg)
    if progress.drift:
        raise typer.Exit(1)


def _run(requests: int, policy: str, seed: int, engine: str, *, as_json: bool) -> Progress:
    from rich.console import Console

    from lora_cache.demo.run import quiet, run
    from lora_cache.demo.screen import LiveView, PlainView, SilentView, final

    if as_json:
        with quiet():
            return run(SilentView(), requests=requests, policy=policy, seed=seed, engine=engine)
    # vLLM prints to where stdout is, so stdout is sent elsewhere, and the screen gets a copy.
    with open(os.dup(1), "w", encoding="utf-8") as stdout:
        console = Console(
            file=stdout, highlight=False, markup=False, width=None if stdout.isatty() else 140
        )
        live = LiveView(console) if console.is_terminal else None
        with quiet(), live or nullcontext():
            view = live or PlainView(console)
            progress = run(view, requests=requests, policy=policy, seed=seed, engine=engine)
        console.print(final(progress))
    return progress
