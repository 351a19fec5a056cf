"""Ranks of the adapters that are to be served, and what they waste in slots of the largest one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lora_cache.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many adapters have which rank.

    Attributes:
        shares: share of the adapters by rank, ascending; they add up to 1.
    """

    shares: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, ranks: Iterable[int]) -> Ranks:
        """Those of adapters that exist."""
        counted = sorted(Counter(ranks).items())
        total = sum(count for _, count in counted)
        return cls(tuple((rank, count / total) for rank, count in counted))

    @classmethod
    def parse(cls, text: str) -> Ranks:
        """``16``; ``8,16,64`` in equal shares; ``8:70,64:30`` in these.

        Raises:
            ConfigError: it is none of these.
        """
        weights: dict[int, float] = {}
        for part in text.split(","):
            number, colon, share = part.partition(":")
            try:
                rank, weight = int(number), float(share) if colon else 1.0
            except ValueError:
                rank, weight = 0, 0.0
            if not (0 < rank <= 1 << 16 and 0 < weight < math.inf) or rank in weights:
                raise ConfigError(
                    f"ranks {text!r}: write 16, or 8,16,64, or with shares 8:70,64:30"
                )
            weights[rank] = weight
        total = sum(weights.values())
        return cls(tuple((rank, weights[rank] / total) for rank in sorted(weights)))

    @property
    def largest(self) -> int:
        return self.shares[-1][0]

    @property
    def mean(self) -> float:
        return sum(rank * share for rank, share in self.shares)

    def without_largest(self) -> Ranks | None:
        """The others, or None if there is only one rank."""
        rest = self.shares[:-1]
        total = sum(share for _, share in rest)
        return Ranks(tuple((rank, share / total) for rank, share in rest)) if rest else None

    def wasted(self, max_lora_rank: int) -> float:
        """Share of the slots that is padding, if every adapter is as popular as the others."""
        return 1 - self.mean / max_lora_rank
