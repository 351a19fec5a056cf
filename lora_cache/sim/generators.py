"""Synthetic traffic: seeded, endless in variety, flat in memory.

Each kind of traffic changes one thing about the plain one, a Zipf law whose popularity stands
still: who is popular, how soon that changes, how requests are spread over the day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_cache.errors import ConfigError
from lora_cache.sim.trace import Request
from lora_cache.spec import parse_spec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNK = 8192

#: `Request` of a tuple of all its fields, filled in C.
_make_request: Callable[[tuple[Any, ...]], Request] = partial(tuple.__new__, Request)


class Traffic(BaseModel):
    """What all kinds have in common.

    Only uniform draws are taken from numpy and turned into what is needed here, so that a seed
    means the same requests with every version of numpy.

    Attributes:
        adapters: how many there are; ``a0`` is the most popular one to begin with.
        skew: the adapter at rank r (from 1) is asked for in proportion to r ** -skew.
        requests: length of the trace.
        rate: requests per second, on average; arrivals are a Poisson process.
        input_tokens, output_tokens: means of geometric distributions.
        seed: of everything that is drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: int = Field(default=1000, ge=1)
    skew: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    requests: int = Field(default=100_000, ge=1)
    rate: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    input_tokens: float = Field(default=512, ge=1, allow_inf_nan=False)
    output_tokens: float = Field(default=128, ge=1, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)

    def generate(self) -> Iterator[Request]:
        """Yield the requests, the same ones each time."""
        stream = np.random.Generator(np.random.PCG64(self.seed))
        names = [f"a{number}" for number in range(self.adapters)]
        clock = 0.0  # seconds that would have passed at a constant rate
        for first in range(0, self.requests, _CHUNK):
            count = min(_CHUNK, self.requests - first)
            draws = stream.random((5, _CHUNK))[:, :count]
            steady = clock + np.cumsum(-np.log1p(-draws[0]) / self.rate)
            clock = float(steady[-1])
            times = self._times(steady)
            who = self._adapters(np.arange(first, first + count), times, draws[1], draws[2])
            fields = zip(
                np.round(times, 6).tolist(),
                self._called(who, names),
                _geometric(draws[3], self.input_tokens),
                _geometric(draws[4], self.output_tokens),
                repeat(None),
                repeat(None),
                strict=False,  # the last two have no end
            )
            yield from map(_make_request, fields)

    def _called(self, who: Ints, names: list[str]) -> list[str]:
        """Names by number.  Beyond the last adapter are those that nobody asks for twice."""
        if who.max() < len(names):
            return list(map(names.__getitem__, who.tolist()))
        return [names[w] if w < len(names) else f"once{w - len(names)}" for w in who.tolist()]

    def _times(self, steady: Floats) -> Floats:
        """Turn arrivals at a constant rate into those of this traffic."""
        return steady

    def _adapters(self, index: Ints, times: Floats, draw: Floats, other: Floats) -> Ints:
        """Number of the adapter of each request, from two uniform draws for each."""
        return self._ranks(draw)

    def _ranks(self, draw: Floats) -> Ints:
        """Ranks, from 0, by the Zipf law."""
        return np.minimum(np.searchsorted(self._law, draw, side="right"), self.adapters - 1)

    @cached_property
    def _law(self) -> Floats:
        weights = np.arange(1, self.adapters + 1, dtype=np.float64) ** -self.skew
        return np.cumsum(weights) / np.sum(weights)

    def _shuffled(self, number: int) -> Ints:
        """A permutation of the adapters, drawn apart from the requests."""
        stream = np.random.Generator(np.random.PCG64([self.seed, 1 + number]))
        return np.argsort(stream.random(self.adapters), kind="stable")


class Zipf(Traffic):
    """Popularity stands still."""


class Phases(Traffic):
    """Popularity is dealt anew, at once, every `every` requests."""

    every: int = Field(default=20_000, ge=1)

    def _adapters(self, index: Ints, times: Floats, draw: Floats, other: Floats) -> Ints:
        ranks, phases = self._ranks(draw), index // self.every
        for phase in range(int(phases[0]), int(phases[-1]) + 1):
            if phase > 0:  # in the first phase a0 is the most popular one, as everywhere
                here = phases == phase
                ranks[here] = self._shuffled(phase)[ranks[here]]
        return ranks


class Drift(Traffic):
    """The adapters stand in a circle; the centre of interest moves on by one every `every`.

    Neighbours on either side of the centre have the next ranks, so that each adapter grows
    popular, peaks and fades.
    """

    every: int = Field(default=500, ge=1)

    def _adapters(self, index: Ints, times: Floats, draw: Floats, other: Floats) -> Ints:
        ranks = self._ranks(draw)
        aside = np.where(ranks % 2 == 1, (ranks + 1) // 2, -(ranks // 2))
        who: Ints = (index // self.every + aside) % self.adapters
        return who


class Daily(Traffic):
    """Days and nights: traffic is at its least at time 0, and each zone has hours of its own.

    Attributes:
        day_s: length of a day, in seconds.
        depth: how much the rate swings: 0 not at all, 1 to nothing at night.
        zones: groups of adapters (every `zones`-th one) whose days begin one after the other.
    """

    rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # the default trace lasts a day
    day_s: float = Field(default=86_400, gt=0, allow_inf_nan=False)
    depth: float = Field(default=0.8, ge=0, le=1)
    zones: int = Field(default=3, ge=1)

    def _times(self, steady: Floats) -> Floats:
        # The traffic of a day up to time t, in closed form and turned round by interpolation.
        hours = np.linspace(0.0, 1.0, 1441)
        done = hours - self.depth / (2 * np.pi) * np.sin(2 * np.pi * hours)
        days, part = np.divmod(steady / self.day_s, 1.0)
        times: Floats = (days + np.interp(part, done, hours)) * self.day_s
        return times

    def _adapters(self, index: Ints, times: Floats, draw: Floats, other: Floats) -> Ints:
        zone = np.arange(self.zones)[:, None]
        awake = 1.0 - self.depth * np.cos(2 * np.pi * (times / self.day_s - zone / self.zones))
        share = np.cumsum(awake, axis=0) + 1e-9
        mine = np.sum(other * share[-1] >= share, axis=0)
        ranks = self._ranks(draw)
        # The adapter of this zone that is next in rank; the last round of zones may be short.
        who: Ints = np.minimum(ranks - ranks % self.zones + mine, self.adapters - 1)
        return who


class Scans(Traffic):
    """Every `every` requests come `length` requests for adapters that are never seen again."""

    every: int = Field(default=1000, ge=1)
    length: int = Field(default=100, ge=0)

    def _adapters(self, index: Ints, times: Floats, draw: Floats, other: Floats) -> Ints:
        turn, place = np.divmod(index, self.every)
        scanned = place >= self.every - self.length
        once = turn * self.length + place - (self.every - self.length)
        return np.where(scanned, self.adapters + once, self._ranks(draw))


class Flash(Traffic):
    """Every `every` requests one adapter out of the crowd has `share` of the next `length`."""

    every: int = Field(default=10_000, ge=1)
    length: int = Field(default=2000, ge=0)
    share: float = Field(default=0.5, ge=0, le=1)

    def _adapters(self, index: Ints, times: Floats, draw: Floats, other: Floats) -> Ints:
        turn, place = np.divmod(index, self.every)
        crowded = (place >= self.every - self.length) & (other < self.share)
        chosen = self._shuffled(0)[turn % self.adapters]
        return np.where(crowded, chosen, self._ranks(draw))


KINDS: dict[str, type[Traffic]] = {
    "zipf": Zipf,
    "phases": Phases,
    "drift": Drift,
    "daily": Daily,
    "scans": Scans,
    "flash": Flash,
}


class SyntheticTrace:
    """The trace that a spec describes, e.g. ``zipf:adapters=1000,skew=1.0,seed=1``.

    Args:
        seed: where the spec gives none.

    Raises:
        ConfigError: the kind or a setting is unknown, or a value out of range.
    """

    def __init__(self, spec: str, seed: int = 0) -> None:
        kind, settings = parse_spec(spec)
        if kind not in KINDS:
            raise ConfigError(
                f"unknown traffic {kind!r}: there are {', '.join(KINDS)}, and .csv and .jsonl files"
            )
        self.name = spec
        values: dict[str, Any] = {"seed": seed, **settings}
        try:
            self.traffic = KINDS[kind].model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            setting = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(KINDS[kind].model_fields)
                raise ConfigError(f"{kind} has no setting {setting!r}: {known}") from error
            raise ConfigError(f"{spec}: {setting}={first['input']!r}: {first['msg']}") from error

    @property
    def requests(self) -> int:
        return self.traffic.requests

    def __iter__(self) -> Iterator[Request]:
        return self.traffic.generate()


def _geometric(draw: Floats, mean: float) -> list[int]:
    """Whole numbers from 1, by inversion."""
    if mean == 1:
        return [1] * len(draw)
    steps = np.floor(np.log1p(-draw) / np.log1p(-1 / mean))
    whole: list[int] = (1 + steps.astype(np.int64)).tolist()
    return whole
