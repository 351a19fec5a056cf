"""Who was where, when: what the picture of residency is drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.policies import PolicyLike
from lora_cache.sim.belady import next_uses
from lora_cache.sim.replay import Replay
from lora_cache.sim.setup import BELADY, Setup
from lora_cache.sim.simulate import policy_name
from lora_cache.sim.trace import Trace
from lora_cache.sim.uses import Keys, Use, batches

NOWHERE, IN_HOST, IN_SLOT = range(3)
_PARTS = 120


@dataclass(frozen=True, slots=True)
class Timeline:
    """Residency of the busiest adapters, looked at in moments of equal distance.

    Attributes:
        adapters: their names: first those that are asked for all the time, the busiest first, then
            the others by the time in which most of their requests come.
        others: how many adapters are left out.
        tiers: for each adapter, `NOWHERE`, `IN_HOST` or `IN_SLOT` in each of the moments.
        miss_ratios: share of requests, between two moments, that did not find a slot ready;
            None where there were none.
        start_s, end_s: of the trace.
    """

    trace: str
    policy: str
    gpu_slots: int
    adapters: list[str]
    others: int
    tiers: list[bytes]
    miss_ratios: list[float | None]
    start_s: float
    end_s: float


def record_timeline(
    trace: Trace,
    policy: PolicyLike,
    slots: int,
    setup: Setup | None = None,
    *,
    columns: int = 600,
    most: int = 40,
) -> Timeline:
    """Replay `trace` and look at who is resident in `columns` moments.

    Args:
        most: how many adapters to show.

    Raises:
        ConfigError: as `simulate`.
    """
    setup = setup or Setup()
    setup.check(policy, slots)
    requests, start_s, end_s = _look_over(trace)
    busiest = [name for name, _ in requests.most_common(most)]
    names = _in_order(busiest, trace, start_s, end_s)
    uses = next_uses(r.adapter for r in trace) if policy == BELADY else None
    replay = setup.replay(policy, slots, uses, trace.name)
    keys = Keys()
    shown = {keys[name]: row for row, name in enumerate(names)}
    tiers = [bytearray(columns) for _ in names]
    misses: list[float | None] = []

    step_s = (end_s - start_s) / columns
    stream = chain.from_iterable(batches(trace, keys, setup.nbytes, setup.host_bytes))
    counted = (0, 0)
    for column, period in enumerate(_periods(stream, start_s, step_s, columns)):
        replay.feed(period)
        replay.advance(start_s + (column + 1) * step_s)
        for key, row in shown.items():
            tiers[row][column] = _tier(replay, key)
        counters = replay.planner.counters
        missed = counters.host_hits + counters.disk_hits
        total = missed + counters.slot_hits
        new = total - counted[1]
        misses.append((missed - counted[0]) / new if new else None)
        counted = (missed, total)
    return Timeline(
        trace=trace.name,
        policy=policy_name(policy),
        gpu_slots=slots,
        adapters=names,
        others=len(requests) - len(names),
        tiers=[bytes(row) for row in tiers],
        miss_ratios=misses,
        start_s=start_s,
        end_s=end_s,
    )


def _look_over(trace: Trace) -> tuple[Counter[str], float, float]:
    """How often each adapter is asked for, and when the trace begins and ends."""
    requests: Counter[str] = Counter()
    times: list[float] = []
    for request in trace:
        requests[request.adapter] += 1
        times[1:] = [request.time_s] if times else [request.time_s] * 2
    if not times or times[0] == times[1]:
        raise ConfigError(f"{trace.name} spans no time: there is no timeline to draw")
    return requests, times[0], times[1]


def _in_order(names: list[str], trace: Trace, start_s: float, end_s: float) -> list[str]:
    """First those that are asked for all the time, as they come; then the others, by their time."""
    parts = {name: [0] * _PARTS for name in names}
    for request in trace:
        if request.adapter in parts:
            part = int(_PARTS * (request.time_s - start_s) / (end_s - start_s))
            parts[request.adapter][min(part, _PARTS - 1)] += 1
    return sorted(names, key=lambda name: _time_of(parts[name]))


def _time_of(counts: list[int]) -> int:
    """When an adapter is asked for more than usual: the middle of it, in 24ths; -1 for never.

    Never means that no twelfth of the trace holds twice its share.  What lies further from the
    highest twelfth than a third of the trace does not count: it is another time.
    """
    usual, width = sum(counts) / _PARTS, _PARTS // 12
    near = [sum(counts[at : at + width]) for at in range(_PARTS - width + 1)]
    peak = near.index(max(near)) + width // 2
    if max(near) < 2 * usual * width:
        return -1
    around = range(max(0, peak - _PARTS // 3), min(_PARTS, peak + _PARTS // 3))
    excess = [max(0.0, counts[at] - usual) for at in around]
    middle = sum(at * more for at, more in zip(around, excess, strict=True)) / sum(excess)
    return round(24 * middle / _PARTS)


def _periods(
    stream: Iterator[Use], start_s: float, step_s: float, columns: int
) -> Iterator[list[Use]]:
    """Requests by column; the last one takes whatever rounding leaves over."""
    use = next(stream, None)
    for column in range(columns):
        until_s = start_s + (column + 1) * step_s
        period = []
        while use is not None and (use[0] < until_s or column == columns - 1):
            period.append(use)
            use = next(stream, None)
        yield period


def _tier(replay: Replay, key: AdapterKey) -> int:
    residency = replay.planner.residency
    if residency.gpu.is_ready(key):
        return IN_SLOT
    return IN_HOST if residency.host.is_ready(key) else NOWHERE
