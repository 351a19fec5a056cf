"""``lora-cache bench``: what vLLM, the stock engine and the resident engine do on this machine."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from lora_cache.cli.output import print_json
from lora_cache.errors import ConfigError

_LEAST_SLOTS = 3


def bench(
    model: Annotated[
        str,
        typer.Option(
            metavar="DIR_OR_ID",
            help="smollm2-135m, llama-3.1-8b, a directory with a config.json, or a model of the "
            "Hub that is in the local cache. Only its shapes matter: weights are made up.",
        ),
    ] = "smollm2-135m",
    adapters: Annotated[int, typer.Option(min=8, max=1000, help="How many.")] = 16,
    slots: Annotated[int, typer.Option(min=_LEAST_SLOTS, max=64, help="GPU slots.")] = 4,
    rank: Annotated[int, typer.Option(min=1, max=512, help="Of every adapter.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Of requests, for each server.")] = 10.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Of these, in requests a second.")] = 1.0,
    servers: Annotated[str, typer.Option(help="Which to measure.")] = "ideal,vllm,stock,resident",
    seed: Annotated[int, typer.Option(min=0, help="Of adapters and requests.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure vLLM by itself, the stock engine and the resident engine on this machine."""
    from lora_cache.bench.report import markdown
    from lora_cache.bench.run import SERVERS, Settings
    from lora_cache.bench.small import measure
    from lora_cache.demo.run import quiet

    chosen = servers.split(",")
    for name in chosen:
        if name not in SERVERS:
            raise ConfigError(f"--servers {name}: choose from {', '.join(SERVERS)}")
    settings = Settings(adapters, slots, rank, seconds, rate, seed=seed)
    if settings.arrivals < 1:
        raise ConfigError(f"--adapters {adapters}: too few for {slots} slots")
    began = time.perf_counter()
    # vLLM prints to stdout and stderr, which are sent elsewhere meanwhile.
    with open(os.dup(2), "w", encoding="utf-8") as stderr:

        def note(text: str) -> None:
            print(f"{time.perf_counter() - began:4.0f} s  {text}", file=stderr, flush=True)

        with quiet():
            found = measure(model, settings, chosen, note)
    found["seconds"] = round(time.perf_counter() - began, 1)
    if as_json:
        print_json(found)
    else:
        typer.echo(markdown(found))
