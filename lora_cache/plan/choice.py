"""How many slots?  Pure: from what each number of slots costs and brings, to one of them.

More slots mean fewer waits and less KV cache.  The rule: as few slots as make requests wait no
longer than they may on average; of those numbers that leave enough KV cache for the traffic.
With more memory it never chooses fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

#: Where no number of slots reaches the target: fewest whose waits are within this of the shortest.
_NEARLY = 1.1
_MOST_SLOTS = 256


class Verdict(StrEnum):
    """What is to be said of a number of slots."""

    CHOSEN = "chosen"
    MORE = "more than needed"
    FEWER = "requests wait longer"
    TIGHT = "too little KV cache for this traffic"
    IMPOSSIBLE = "does not fit"


@dataclass(frozen=True, slots=True)
class Option:
    """One number of slots.

    Attributes:
        max_loras: how many.
        slot_bytes: on each GPU, with what is beside them.
        kv_bytes, kv_tokens: left for the KV cache.
        contexts: how many contexts of the greatest length that holds.
        slot_hits, host_hits: shares of the requests that find their adapter there.
        wait_s, wait_p99_s: what requests wait for their adapter; p99 None where leases end at once.
    """

    max_loras: int
    slot_bytes: int
    kv_bytes: int
    kv_tokens: int
    contexts: float
    slot_hits: float
    host_hits: float
    wait_s: float
    wait_p99_s: float | None


def candidates(adapters: int) -> list[int]:
    """Numbers of slots to try for so many adapters: powers of two, and a slot for each."""
    most = max(1, min(adapters, _MOST_SLOTS))
    return sorted({most, *(1 << n for n in range(9) if 1 << n < most)})


def choose(
    options: Sequence[Option], needed_tokens: int, least_tokens: int, target_wait_s: float
) -> tuple[Option | None, list[Verdict]]:
    """Choose one of them.

    Args:
        options: in ascending order.
        needed_tokens: KV cache that the traffic needs, in tokens.
        least_tokens: without which vLLM does not start.
        target_wait_s: what requests may wait for their adapter, on average.

    Returns:
        the choice (None if nothing fits at all), and what is to be said of each option.
    """
    possible = [option for option in options if option.kv_tokens >= least_tokens]
    ample = [option for option in possible if option.kv_tokens >= needed_tokens]
    chosen = None
    if ample:
        shortest = min(option.wait_s for option in ample)
        limit = target_wait_s if shortest <= target_wait_s else shortest * _NEARLY
        chosen = next(option for option in ample if option.wait_s <= limit)
    elif possible:
        chosen = possible[0]
    return chosen, [_verdict(option, chosen, ample, possible) for option in options]


def _verdict(
    option: Option, chosen: Option | None, ample: list[Option], possible: list[Option]
) -> Verdict:
    if option not in possible:
        return Verdict.IMPOSSIBLE
    if option is chosen:
        return Verdict.CHOSEN
    if option not in ample:
        return Verdict.TIGHT
    assert chosen is not None
    return Verdict.MORE if option.max_loras > chosen.max_loras else Verdict.FEWER
