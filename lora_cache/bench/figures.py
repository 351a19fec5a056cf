"""Figures of many times: quantiles, and a row of what a server did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lora_cache.bench.servers import Row
from lora_cache.bench.streams import Answer


def quantile(numbers: Sequence[float], share: float) -> float:
    """The smallest that at least `share` of them do not exceed."""
    ordered = sorted(numbers)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)] if ordered else math.nan


def summary(answers: Sequence[Answer], seconds: float) -> Row:
    """What came of a stream of requests.

    Times are in milliseconds, from the moment that a request was due; None is one that never came.

    Args:
        seconds: that it all took.
    """
    first = [answer.first_token_s for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    done = sum(answer.done for answer in answers)

    def ms(number: float) -> float | None:
        return round(number * 1e3, 1) if number < math.inf else None

    return {
        "requests": len(answers),
        "done": done,
        "adapters": len({answer.adapter for answer in answers}),
        "ttft_mean_ms": ms(sum(first) / len(first)) if first else None,
        "ttft_p50_ms": ms(quantile(first, 0.5)),
        "ttft_p90_ms": ms(quantile(first, 0.9)),
        "ttft_p99_ms": ms(quantile(first, 0.99)),
        "gap_p50_ms": ms(quantile(gaps, 0.5)),
        "gap_p99_ms": ms(quantile(gaps, 0.99)),
        "gap_p999_ms": ms(quantile(gaps, 0.999)),
        "gap_max_ms": ms(max(gaps, default=0.0)),
        "requests_per_s": round(done / seconds, 3) if seconds else 0.0,
    }


def spread(seconds: Sequence[float]) -> Row:
    """Median, ninth decile and the longest, in milliseconds."""
    return {
        "median_ms": round(statistics.median(seconds) * 1e3, 2),
        "p90_ms": round(quantile(seconds, 0.9) * 1e3, 2),
        "max_ms": round(max(seconds) * 1e3, 2),
    }
