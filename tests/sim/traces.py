"""Traces made of a list, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lora_cache.sim import Request


class ListTrace:
    """Requests that are held in memory."""

    def __init__(self, requests: Iterable[Request], name: str = "list") -> None:
        self.name = name
        self.held = list(requests)

    @property
    def requests(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.held)


def asking(adapters: Iterable[object], every_s: float = 1.0) -> ListTrace:
    """One request after the other."""
    return ListTrace(
        Request(number * every_s, str(adapter), 10, 100) for number, adapter in enumerate(adapters)
    )
