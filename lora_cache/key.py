"""The identity of an adapter: what everything else is keyed by."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """The immutable identity of one adapter: two keys are equal if and only if the content is.

    Attributes:
        digest: what decides equality, e.g. ``"blake3:9f2c…"`` for a local directory.
        name: a short name for people; not part of the identity.
    """

    digest: str
    name: str = field(default="", compare=False)

    def __hash__(self) -> int:  # half the time of the generated one, which makes a tuple first
        return hash(self.digest)

    def __str__(self) -> str:
        return f"{self.name}@{self.digest.rpartition(':')[2][:12]}" if self.name else self.digest
