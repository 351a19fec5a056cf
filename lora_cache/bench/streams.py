"""Requests that arrive by themselves, and when the tokens of their answers came."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lora_cache.bench.servers import Server

DRAIN_S = 40.0


@dataclass
class Answer:
    """When the tokens of one request came, in seconds of one clock."""

    adapter: int
    due: float
    tokens: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def first_token_s(self) -> float:
        return self.tokens[0] - self.due if self.tokens else float("inf")

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in pairwise(self.tokens)]


async def ask(server: Server, answer: Answer, prompt: Any, params: Any) -> Answer:
    """Serve one request, and note when its tokens come."""
    async for output in server.stream(prompt, params, answer.adapter):
        now = time.perf_counter()
        answer.tokens += [now] * len(output.outputs[0].token_ids)
    answer.done = True
    return answer


async def replay(
    server: Server,
    arrivals: Sequence[tuple[float, int]],
    prompts: Sequence[Any],
    params: Sequence[Any],
    drain_s: float = DRAIN_S,
) -> tuple[list[Answer], float]:
    """Send requests when they are due; returns the answers, and the seconds that it all took.

    Args:
        arrivals: (seconds from now, adapter), in order of time.
        drain_s: what is not done so long after the last arrival is given up.
    """
    began = time.perf_counter()
    tasks: list[asyncio.Task[Answer]] = []
    answers: list[Answer] = []
    for (at, adapter), words, how in zip(arrivals, prompts, params, strict=True):
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        answers.append(Answer(adapter, began + at))
        tasks.append(asyncio.create_task(ask(server, answers[-1], words, how)))
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=drain_s)
        for task in late:
            task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    last = max((answer.tokens[-1] for answer in answers if answer.tokens), default=began)
    return answers, last - began


def longest_gap(running: Sequence[Answer], since: float, until: float) -> float:
    """The longest time between two tokens of any of these, of gaps that reach into that time."""
    found = 0.0
    for answer in running:
        for a, b in pairwise(answer.tokens):
            if b > since and a < until:
                found = max(found, b - a)
    return found


def zipf(order: Sequence[int], skew: float) -> list[float]:
    """How popular each adapter is, the first in `order` most."""
    weights = [0.0] * len(order)
    for rank, adapter in enumerate(order):
        weights[adapter] = (rank + 1) ** -skew
    return weights


def poisson(
    rng: random.Random, rate: float, seconds: float, weights: Sequence[float]
) -> list[tuple[float, int]]:
    """(seconds, adapter) of arrivals, `rate` in each second on average."""
    adapters, found, at = range(len(weights)), [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append((at, rng.choices(adapters, weights)[0]))
    return found
