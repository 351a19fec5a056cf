"""The command line, ``lora-cache``.  One command a file; nothing heavy is imported up here."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_cache._version import __version__
from lora_cache.cli import bench, demo, ls, plan, prune, pull, simulate, status, verify
from lora_cache.cli.output import Commands

app = typer.Typer(
    name="lora-cache",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo.demo)
app.command()(pull.pull)
app.command()(ls.ls)
app.command()(verify.verify)
app.command()(prune.prune)
app.command()(simulate.simulate)
app.command()(plan.plan)
app.command()(bench.bench)
app.command()(status.status)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-cache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Fetch LoRA adapters, look at them, and at the caches that serve them on this machine."""


def main() -> None:
    """Run the command line; the entry point ``lora-cache``."""
    app(prog_name="lora-cache")
