"""Where the time of the resident engine's loads went."""

from __future__ import annotations

from collections import deque
from typing import Any

from lora_cache.bench.figures import spread
from lora_cache.bench.servers import Row


class Parts:
    """The parts of an engine's last loads, a thousand at most.

    What a command to the workers took falls into what the device did (`waited`, `copied`,
    `scattered`), what else the worker did (`published`), and the messages there and back, in
    which both processes wait for their turn (`told`).
    """

    NAMES = ("examined", "packed", "locked", "waited", "copied", "scattered")

    def __init__(self, times: deque[Any]) -> None:
        self._times = times

    @classmethod
    def of(cls, server: Any) -> Parts:
        """Those of a server that is open; none, if its engine does not tell them."""
        engine = getattr(getattr(server, "cache", None), "_engine", None)
        return cls(getattr(engine, "load_times", deque()))

    def clear(self) -> None:
        self._times.clear()

    def take(self) -> Row:
        """Spreads of all parts since `clear`, under one name; nothing if there was no load."""
        times = list(self._times)
        self.clear()
        if not times:
            return {}
        found = {name: [getattr(each, name) for each in times] for name in self.NAMES}
        found["published"] = [t.handled - t.waited - t.copied - t.scattered for t in times]
        found["told"] = [t.commanded - t.handled for t in times]
        return {"parts": {name: spread(seconds) for name, seconds in found.items()}}
