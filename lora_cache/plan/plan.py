"""From a model, a GPU, adapters and traffic to the settings of vLLM."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_cache.errors import ConfigError
from lora_cache.plan.adapters import Adapters, of_ranks
from lora_cache.plan.budget import GIB, Budget, EngineSettings, make_budget
from lora_cache.plan.choice import Option, Verdict, candidates, choose
from lora_cache.plan.model import ITEM_BYTES, Model
from lora_cache.plan.ranks import Ranks
from lora_cache.plan.slots import (
    SlotSettings,
    check_target_modules,
    packed_copies,
    smallest_rank,
)
from lora_cache.plan.traffic import Traffic
from lora_cache.plan.warnings import warnings_of
from lora_cache.policies import PolicyLike
from lora_cache.sim import Hold, Row, Setup, Trace, simulate

#: KV cache is planned for so many times the traffic's average: it comes in bursts.
HEADROOM = 2.0
_DISK_HEADROOM = 1.2  # room for what is being fetched while nothing may go

#: Told how many requests have been replayed, and of how many.
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is planned for, beside model, adapters and traffic.

    Attributes:
        gpu_bytes: memory of one GPU.
        slots: its rank is replaced by the least that admits the adapters.
        host_bytes: what adapters may take in host memory.
        hold: how long requests hold their adapter; None: not at all.
        policy: who leaves slots and host memory.
        target_wait_s: what requests may wait for their adapter, on average.
        max_loras: numbers of slots to try; None: powers of two.
    """

    gpu_bytes: int
    slots: SlotSettings
    engine: EngineSettings
    host_bytes: int = 64 * GIB
    hold: Hold | None = None
    policy: PolicyLike = "lru"
    target_wait_s: float = 0.02
    max_loras: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is recommended, and all that it follows from.

    Attributes:
        wishes: with the rank that was chosen.
        needed_tokens: KV cache that the traffic needs, in tokens.
        host_entries: adapters that host memory shall hold.
        copies: how often the bytes of each are there, over all GPUs.
        disk_bytes: for the store of adapters.
        image_bytes: for what the resident engine has packed; 0 with the stock engine.
        options: the numbers of slots that were tried, and `verdicts` on each.
        chosen: one of them; None if not even one slot fits.
        warnings: sentences for a user.
    """

    model: Model
    adapters: Adapters
    traffic: Traffic
    wishes: Wishes
    budget: Budget
    needed_tokens: int
    host_entries: int
    copies: float
    disk_bytes: int
    image_bytes: int
    options: tuple[Option, ...]
    verdicts: tuple[Verdict, ...]
    chosen: Option | None
    warnings: tuple[str, ...]

    @property
    def host_bytes(self) -> int:
        """What they take there."""
        return round(self.host_entries * self.adapters.host_bytes * self.copies)

    @property
    def max_cpu_loras(self) -> int:
        """What vLLM is told: the stock engine keeps one place free to load into."""
        return self.host_entries + (0 if self.wishes.engine.resident else 1)

    def vllm_args(self) -> list[str]:
        """Arguments of ``vllm serve``, after the model."""
        if self.chosen is None:
            return []
        slots, engine = self.wishes.slots, self.wishes.engine
        given: list[tuple[str, Any, bool]] = [
            ("--enable-lora", None, True),
            ("--max-loras", self.chosen.max_loras, True),
            ("--max-lora-rank", slots.max_lora_rank, True),
            ("--max-cpu-loras", self.max_cpu_loras, True),
            ("--gpu-memory-utilization", f"{self.budget.utilization:g}", True),
            ("--max-model-len", engine.max_model_len, engine.max_model_len != self.model.max_len),
            ("--max-num-seqs", engine.max_num_seqs, True),
            ("--max-num-batched-tokens", engine.max_num_batched_tokens, True),
            ("--tensor-parallel-size", slots.tp, slots.tp > 1),
            ("--lora-dtype", slots.lora_dtype, slots.lora_dtype != "auto"),
            ("--kv-cache-dtype", engine.kv_cache_dtype, engine.kv_cache_dtype != "auto"),
            ("--fully-sharded-loras", None, slots.fully_sharded),
        ]
        args = [str(part) for name, value, is_set in given if is_set for part in (name, value)]
        args = [part for part in args if part != "None"]
        if slots.target_modules is not None:
            args += ["--lora-target-modules", *slots.target_modules]
        return args

    def command(self) -> str:
        """The command line to start vLLM with, or ""."""
        args = self.vllm_args()
        return shlex.join(["vllm", "serve", self.model.name, *args]) if args else ""

    def to_dict(self) -> dict[str, Any]:
        """The documented form of ``plan --json``."""
        budget, slots, chosen = self.budget, self.wishes.slots, self.chosen
        return {
            "model": self.model.name,
            "architecture": self.model.architecture,
            "is_estimate": self.model.is_estimate,
            "tensor_parallel_size": slots.tp,
            "max_loras": chosen.max_loras if chosen else None,
            "max_lora_rank": slots.max_lora_rank,
            "max_cpu_loras": self.max_cpu_loras,
            "gpu_memory_utilization": budget.utilization,
            "disk_bytes": self.disk_bytes,
            "image_bytes": self.image_bytes,
            "host_bytes": self.host_bytes,
            "bytes_per_slot": budget.slots.bytes_per_slot,
            "fixed_slot_bytes": budget.slots.fixed_bytes,
            "gpu_bytes": budget.gpu_bytes,
            "vllm_bytes": budget.vllm_bytes,
            "weight_bytes": budget.weight_bytes,
            "working_bytes": budget.working_bytes,
            "staging_bytes": budget.staging_bytes,
            "kv_bytes_per_token": budget.kv_bytes_per_token,
            "kv_bytes": chosen.kv_bytes if chosen else 0,
            "kv_tokens": chosen.kv_tokens if chosen else 0,
            "kv_tokens_needed": self.needed_tokens,
            "max_model_len": self.wishes.engine.max_model_len,
            "trace": self.traffic.name,
            "requests": self.traffic.requests,
            "adapters": self.traffic.adapters,
            "rate": round(self.traffic.rate, 6),
            "rank_padding": round(self.adapters.ranks.wasted(slots.max_lora_rank), 4),
            "options": [
                _option_dict(option) | {"verdict": str(verdict)}
                for option, verdict in zip(self.options, self.verdicts, strict=True)
            ],
            "warnings": list(self.warnings),
            "vllm_args": self.vllm_args(),
        }


def make_plan(
    model: Model,
    adapters: Adapters | None,
    trace: Trace,
    wishes: Wishes,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Reckon and simulate.  Reads `trace` twice.

    Args:
        adapters: None: of the ranks that the trace tells, or else of rank 16.

    Raises:
        ConfigError: vLLM would refuse this model on these GPUs, the trace is malformed, or host
            memory holds no adapter.
    """
    traffic = Traffic.of(trace, wishes.hold)
    if adapters is None:
        item = ITEM_BYTES[wishes.slots.dtype(model)]
        ranks, is_assumed = traffic.ranks or Ranks.parse("16"), traffic.ranks is None
        adapters = replace(of_ranks(ranks, model, item), is_assumed=is_assumed)
    rank = max(wishes.slots.max_lora_rank, smallest_rank(adapters.ranks.largest))
    wishes = replace(wishes, slots=replace(wishes.slots, max_lora_rank=rank))
    if wishes.slots.target_modules is not None:
        check_target_modules(model, wishes.slots.target_modules)
    budget = make_budget(model, wishes.slots, wishes.engine, wishes.gpu_bytes)
    copies = _copies(model, adapters, wishes)
    host_entries = _host_entries(adapters, traffic, wishes, copies)

    numbers = _numbers(wishes, min(traffic.adapters, host_entries), host_entries)
    setup = Setup.of_engine(
        "resident" if wishes.engine.resident else "stock",
        host_entries=host_entries,
        hold=wishes.hold,
        nbytes=adapters.host_bytes,
        belady=False,
    )
    rows = simulate(trace, [wishes.policy], numbers, setup, progress)
    options = tuple(_option(budget, row, wishes.engine.max_model_len) for row in rows)
    needed = max(wishes.engine.max_model_len, math.ceil(HEADROOM * traffic.tokens_in_flight))
    chosen, verdicts = choose(options, needed, wishes.engine.max_model_len, wishes.target_wait_s)
    count = _DISK_HEADROOM * max(adapters.count or 0, traffic.adapters)
    packed = count * adapters.host_bytes * copies if wishes.engine.resident else 0
    plan = Plan(
        model=model,
        adapters=adapters,
        traffic=traffic,
        wishes=wishes,
        budget=budget,
        needed_tokens=needed,
        host_entries=host_entries,
        copies=copies,
        disk_bytes=_whole_gib(count * adapters.disk_bytes),
        image_bytes=_whole_gib(packed) if packed else 0,
        options=options,
        verdicts=tuple(verdicts),
        chosen=chosen,
        warnings=(),
    )
    return replace(plan, warnings=tuple(warnings_of(plan)))


def _copies(model: Model, adapters: Adapters, wishes: Wishes) -> float:
    """Each GPU's worker holds a copy of its own; of packed images only its share."""
    if not wishes.engine.resident:
        return float(wishes.slots.tp)
    return packed_copies(model, wishes.slots, adapters.targets or ())


def _host_entries(adapters: Adapters, traffic: Traffic, wishes: Wishes, copies: float) -> int:
    """As many as there are, if they fit."""
    each = max(1, adapters.host_bytes * copies)
    fit = int(wishes.host_bytes // each)
    if fit < 1:
        raise ConfigError(
            f"host memory of {wishes.host_bytes / GIB:.1f} GiB holds no adapter of "
            f"{each / GIB:.2f} GiB ({copies:.3g} copies): it needs more"
        )
    return min(fit, max(adapters.count or 0, traffic.adapters))


def _numbers(wishes: Wishes, adapters: int, most: int) -> list[int]:
    if wishes.max_loras is None:
        return candidates(adapters)
    for number in wishes.max_loras:
        if not 1 <= number <= most:
            raise ConfigError(
                f"{number} slots: there must be at least one, and no more than the {most} adapters "
                "that host memory holds"
            )
    return sorted(set(wishes.max_loras))


def _option(budget: Budget, row: Row, max_model_len: int) -> Option:
    tokens = budget.kv_tokens(row.gpu_slots)
    return Option(
        max_loras=row.gpu_slots,
        slot_bytes=budget.slots.nbytes(row.gpu_slots),
        kv_bytes=budget.kv_bytes(row.gpu_slots),
        kv_tokens=tokens,
        contexts=tokens / max_model_len,
        slot_hits=row.slot_hits / row.requests,
        host_hits=row.host_hits / row.requests,
        wait_s=row.wait_s / row.requests,
        wait_p99_s=row.wait_p99_s,
    )


def _option_dict(option: Option) -> dict[str, Any]:
    return {
        "max_loras": option.max_loras,
        "slot_bytes": option.slot_bytes,
        "kv_bytes": option.kv_bytes,
        "kv_tokens": option.kv_tokens,
        "contexts": round(option.contexts, 3),
        "slot_hit_ratio": round(option.slot_hits, 6),
        "host_hit_ratio": round(option.host_hits, 6),
        "wait_s": round(option.wait_s, 6),
        "wait_p99_s": option.wait_p99_s,
    }


def _whole_gib(nbytes: float) -> int:
    return max(1, math.ceil(nbytes / GIB)) * GIB
