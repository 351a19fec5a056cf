"""``lora-cache plan``: how to start vLLM for these adapters, and what each choice costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from lora_cache.cli.options import (
    EngineOption,
    HoldOption,
    SeedOption,
    parse_numbers,
    parse_size,
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
    from lora_cache.plan import Adapters, Model, Option, Plan, Ranks, SlotSettings
    from lora_cache.sim import Trace

_MODEL = (
    "A directory with a model's config.json, that file, or ORG/NAME if it is in the local cache."
)
_DEFAULT_COUNT = 100
_COLUMNS = (">slots", ">they take", ">KV cache", ">tokens", ">contexts", ">slot hits", ">host hits")


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL|DIR", help=_MODEL)],
    gpu_memory: Annotated[
        int, typer.Option(parser=parse_size, metavar="SIZE", help="Memory of one GPU.")
    ] = "80GiB",  # type: ignore[assignment]  # typer parses defaults, too
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    adapters: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The adapters to serve: a directory of them.", show_default=False
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="R[,R...]",
            help="Or their ranks: 16; 8,16,64 in equal shares; 8:70,64:30 in these.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|TRAFFIC",
            help="Requests: a trace as for simulate, or zipf:adapters=200,skew=1,rate=8.",
            show_default=False,
        ),
    ] = None,
    host_memory: Annotated[
        int,
        typer.Option(parser=parse_size, metavar="SIZE", help="What adapters may take of it."),
    ] = "64GiB",  # type: ignore[assignment]
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest context; the model's own, if not given.", show_default=False
        ),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]", help="Numbers of slots to try, not 1,2,4,….", show_default=False
        ),
    ] = None,
    target_wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for an adapter that are fine on average.")
    ] = 0.02,
    hold: HoldOption = "0.02/token",
    policy: Annotated[str, typer.Option(metavar="NAME", help="As for simulate.")] = "lru",
    engine: EngineOption = "stock",
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="As for vLLM; recommended, if not given.", show_default=False),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="As for vLLM.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="As for vLLM.")] = 8192,
    dtype: Annotated[str, typer.Option(help="As for vLLM.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="As for vLLM.")] = "auto",
    lora_dtype: Annotated[str, typer.Option(help="As for vLLM.")] = "auto",
    max_lora_rank: Annotated[
        int | None,
        typer.Option(help="As for vLLM; what the adapters need, if not given.", show_default=False),
    ] = None,
    fully_sharded_loras: Annotated[
        bool, typer.Option("--fully-sharded-loras", help="As for vLLM.")
    ] = False,
    lora_target_modules: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME...]", help="As for vLLM: no slots for others.", show_default=False
        ),
    ] = None,
    working_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="What vLLM's trial run takes, if you know it; else estimated.",
            show_default=False,
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="ARCHITECTURE",
            help="Reckon an unknown architecture as this one.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    explained: Annotated[
        bool, typer.Option("--explain", help="Show the arithmetic, line by line.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recommend vLLM's settings for many adapters.  Needs no GPU, no weights and no vLLM."""
    from lora_cache.errors import ConfigError
    from lora_cache.plan import EngineSettings, SlotSettings, Wishes, make_plan, read_model
    from lora_cache.sim import parse_hold

    if engine not in ("stock", "resident"):
        raise ConfigError(f"--engine {engine}: choose stock or resident")
    read = read_model(model, like=like, dtype=dtype)
    targets = lora_target_modules.split(",") if lora_target_modules else None
    slot_settings = SlotSettings(
        max_lora_rank=max_lora_rank or 1,
        tp=tp,
        lora_dtype=lora_dtype,
        fully_sharded=fully_sharded_loras,
        target_modules=tuple(targets) if targets else None,
    )
    wishes = Wishes(
        gpu_bytes=gpu_memory,
        slots=slot_settings,
        engine=EngineSettings(
            max_model_len=max_model_len or read.max_len or 4096,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_dtype=kv_cache_dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            working_bytes=working_memory,
            resident=engine == "resident",
        ),
        host_bytes=host_memory,
        hold=parse_hold(hold),
        policy=policy,
        target_wait_s=target_wait,
        max_loras=parse_numbers("--slots", slots) if slots else None,
    )
    served, opened = _load(read, slot_settings, adapters, rank, trace, seed)
    with counting(opened.name) as progress:
        made = make_plan(read, served, opened, wishes, progress)
    if as_json:
        print_json(made.to_dict())
    else:
        _print(made, explained=explained)
    if made.chosen is None:
        raise typer.Exit(1)


def _load(
    model: Model,
    slots: SlotSettings,
    directory: Path | None,
    rank: str | None,
    trace: str | None,
    seed: int,
) -> tuple[Adapters | None, Trace]:
    """What is known of the adapters, and the traffic."""
    from lora_cache.plan import Ranks, in_directory, of_ranks
    from lora_cache.plan.model import ITEM_BYTES
    from lora_cache.sim import open_trace

    if directory is not None and rank is not None:
        raise typer.BadParameter("give --adapters, or --rank: not both")
    item = ITEM_BYTES[slots.dtype(model)]
    found = None
    if directory is not None:
        found = in_directory(directory.expanduser(), item)
    elif rank is not None:
        found = of_ranks(Ranks.parse(rank), model, item)
    count = found.count if found and found.count else _DEFAULT_COUNT
    return found, open_trace(trace or f"zipf:adapters={count},requests=20000,rate=8", seed)


# ---------------------------------------------------------------------- what is printed


def _print(plan: Plan, *, explained: bool) -> None:
    from lora_cache.plan import explain

    console = make_console()
    for line in _heading(plan):
        console.print(line, soft_wrap=True)
    if explained:
        console.print()
        for line in explain(plan):
            console.print(one_line(line), soft_wrap=True)
    console.print()
    console.print(_table(plan))
    console.print()
    if plan.chosen is not None:
        _print_settings(console, plan, plan.chosen)
    for warning in plan.warnings:
        text = Text("note: ", style="bold yellow").append(
            one_line(warning), style="not bold default"
        )
        console.print(text, soft_wrap=True)
    if command := plan.command():
        console.print()
        console.print(one_line(command), soft_wrap=True)


def _heading(plan: Plan) -> list[str]:
    model, budget, slots, traffic = plan.model, plan.budget, plan.wishes.slots, plan.traffic
    gpus = f"{slots.tp} GPUs" if slots.tp > 1 else "one GPU"
    about = "about " if model.is_estimate else ""
    working = "" if plan.wishes.engine.working_bytes is not None else " (estimated)"
    return [
        one_line(
            f"{model.name}: {model.architecture} in {model.dtype}, on {gpus} of "
            f"{human_bytes(budget.gpu_bytes)}"
        ),
        f"on each: weights {about}{human_bytes(budget.weight_bytes)}, to work "
        f"{human_bytes(budget.working_bytes)}{working}, a slot of rank {slots.max_lora_rank} "
        f"{human_bytes(budget.slots.bytes_per_slot)} ({budget.slots.bytes_per_slot:,} bytes), KV "
        f"cache {human_bytes(budget.kv_bytes_per_token)} a token",
        one_line(
            f"{traffic.name}: {traffic.requests:,} requests for {traffic.adapters:,} adapters, "
            f"{traffic.rate:.3g} a second"
        ),
    ]


def _table(plan: Plan) -> object:
    held = any(option.wait_p99_s is not None for option in plan.options)
    columns = [*_COLUMNS, ">wait", *([">p99"] if held else []), ""]
    rows = [
        _cells(option, str(verdict), held=held)
        for option, verdict in zip(plan.options, plan.verdicts, strict=True)
    ]
    return table(columns, rows)


def _cells(option: Option, verdict: str, *, held: bool) -> tuple[str, ...]:
    return (
        str(option.max_loras),
        human_bytes(option.slot_bytes),
        human_bytes(option.kv_bytes),
        f"{option.kv_tokens:,}",
        f"{option.contexts:.1f}",
        f"{option.slot_hits:.1%}",
        f"{option.host_hits:.1%}",
        _seconds(option.wait_s),
        *((_seconds(option.wait_p99_s or 0.0),) if held else ()),
        "← " + verdict if verdict == "chosen" else verdict,
    )


def _print_settings(console: Console, plan: Plan, chosen: Option) -> None:
    rows = [
        ("max_loras", str(chosen.max_loras), f"{human_bytes(chosen.slot_bytes)} on each GPU"),
        ("max_lora_rank", str(plan.wishes.slots.max_lora_rank), _ranks(plan.adapters.ranks)),
        (
            "max_cpu_loras",
            str(plan.max_cpu_loras),
            f"{human_bytes(plan.host_bytes)} of host memory",
        ),
        ("gpu_memory_utilization", f"{plan.budget.utilization:g}", ""),
        ("disk_bytes", f"{plan.disk_bytes >> 30}GiB", "of AsyncLoraCache"),
    ]
    if plan.image_bytes:
        rows.append(("image_bytes", f"{plan.image_bytes >> 30}GiB", "of AsyncLoraCache"))
    console.print(table(("set", "to", ""), rows))


def _ranks(ranks: Ranks) -> str:
    shown = ", ".join(f"{rank} ({share:.0%})" for rank, share in ranks.shares[:5])
    return f"ranks {shown}" + (", …" if len(ranks.shares) > 5 else "")


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:,.1f} s"
