"""Which policy, how many slots: a trace is replayed through every combination at once."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lora_cache.errors import ConfigError
from lora_cache.policies import PolicyLike, policy_names
from lora_cache.sim.belady import next_uses
from lora_cache.sim.replay import Replay
from lora_cache.sim.rows import Row
from lora_cache.sim.setup import BELADY, Setup
from lora_cache.sim.trace import Trace
from lora_cache.sim.uses import Keys, batches

#: Told how many requests have been read, and of how many (None: not known yet).
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class _Run:
    """One combination."""

    name: str
    slots: int
    replay: Replay

    @property
    def gpu_misses(self) -> int:
        counters = self.replay.planner.counters
        return counters.host_hits + counters.disk_hits


def simulate(
    trace: Trace,
    policies: Sequence[PolicyLike] = (),
    gpu_slots: Sequence[int] = (8,),
    setup: Setup | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Row]:
    """Replay `trace` under every policy with every number of slots.

    It is read once for all of them together (twice with Belady's policy) and never held whole.

    Args:
        policies: names, specs like ``"lfu:half_life_s=inf"``, ``"belady"``, or classes; every
            name there is, if none is given.
        gpu_slots: numbers of slots to try.
        setup: `Setup()`, if not given.

    Returns:
        a row for each, by slots, then in the order of `policies`.

    Raises:
        ConfigError: a setting is out of range, the trace is malformed, or an adapter does not
            fit into host memory.
    """
    setup = setup or Setup()
    chosen = list(policies or policy_names())
    wanted = [(slots, policy) for slots in gpu_slots for policy in chosen]
    for slots, policy in wanted:
        setup.check(policy, slots)
    uses = None
    if setup.belady or BELADY in chosen:
        uses = next_uses(_names(trace, progress))

    def run(slots: int, policy: PolicyLike) -> _Run:
        return _Run(policy_name(policy), slots, setup.replay(policy, slots, uses, trace.name))

    runs = [run(slots, policy) for slots, policy in wanted]
    references = [run(slots, BELADY) for slots in gpu_slots if setup.belady]
    with _without_gc():
        requests, adapters = _replay(trace, [*runs, *references], setup, uses, progress)
    lru = {run.slots: run.gpu_misses for run in runs if run.name == "lru"}
    best = {run.slots: run.gpu_misses for run in references}
    return [
        _row(trace, run, setup, requests, adapters, lru.get(run.slots), best.get(run.slots))
        for run in runs
    ]


@contextmanager
def _without_gc() -> Iterator[None]:
    """A replay makes no cycles, and looking for them takes a tenth of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def policy_name(policy: PolicyLike) -> str:
    """How a policy is named in tables: as it was written, or by its class."""
    return policy if isinstance(policy, str) else getattr(policy, "__name__", repr(policy))


def _names(trace: Trace, progress: Progress) -> Iterator[str]:
    for done, request in enumerate(trace):
        if done % 1024 == 0:
            progress(done, trace.requests)
        yield request.adapter


def _replay(
    trace: Trace, runs: list[_Run], setup: Setup, uses: array[int] | None, progress: Progress
) -> tuple[int, int]:
    """Replay everything.  Returns how many requests and how many adapters there were."""
    total = trace.requests if uses is None else len(uses)
    done, keys = 0, Keys()
    for batch in batches(trace, keys, setup.nbytes, setup.host_bytes):
        for run in runs:
            run.replay.feed(batch)
        done += len(batch)
        progress(done, total)
    if not done:
        raise ConfigError(f"{trace.name} holds no requests")
    if uses is not None and done != len(uses):
        raise ConfigError(f"{trace.name} had {len(uses)} requests, now {done}: it is being changed")
    for run in runs:
        run.replay.finish()
    return done, len(keys)


def _row(
    trace: Trace,
    run: _Run,
    setup: Setup,
    requests: int,
    adapters: int,
    lru: int | None,
    best: int | None,
) -> Row:
    replay, counters, misses = run.replay, run.replay.planner.counters, run.gpu_misses
    closed = None
    if lru is not None and best is not None and lru != best:
        closed = round((lru - misses) / (lru - best), 4)
    p50, p99 = (replay.waited_s(share) for share in (0.5, 0.99))
    return Row(
        trace=trace.name,
        policy=run.name,
        gpu_slots=run.slots,
        host_entries=setup.host_entries,
        host_bytes=setup.host_bytes,
        hold="none" if setup.hold is None else str(setup.hold),
        requests=requests,
        adapters=adapters,
        slot_hits=counters.slot_hits,
        host_hits=counters.host_hits,
        disk_hits=counters.disk_hits,
        gpu_misses=misses,
        host_misses=counters.disk_hits,
        evictions=counters.gpu_evictions + counters.host_evictions,
        gpu_evictions=counters.gpu_evictions,
        host_evictions=counters.host_evictions,
        drains=counters.drains,
        disk_to_host_bytes=replay.from_disk_bytes,
        host_to_slot_bytes=replay.into_slots_bytes,
        wait_s=round(replay.wait_s, 6),
        wait_p50_s=None if p50 is None else round(p50, 6),
        wait_p99_s=None if p99 is None else round(p99, 6),
        miss_ratio=round(misses / requests, 6),
        belady_gpu_misses=best,
        belady_closed=closed,
    )
