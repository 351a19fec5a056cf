"""Threads that share the work on one image.

Copies, reads and checksums release the interpreter lock; fresh pages are the larger part of what an
image costs, and several threads fault them in faster than one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

_MOST = 8  # memory is the limit then, and vLLM needs its cores


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Hands:
    """A few threads for all who have work to share.  Thread-safe.

    Args:
        count: how many; a fourth of the cores if None.  With one the caller does it all.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or min(_MOST, max(1, core_count() // 4))
        self._pool = ThreadPoolExecutor(self.count, "lora-cache-hand") if self.count > 1 else None

    def do(self, work: Callable[[T], None], parts: Sequence[T]) -> None:
        """Call `work` with every part; returns when all calls have.

        Raises:
            what the first call raised that failed, in the order of `parts`.
        """
        if self._pool is None:
            for part in parts:
                work(part)
            return
        calls = [self._pool.submit(work, part) for part in parts]
        wait(calls)  # nobody may write any more when this returns, or raises
        for call in calls:
            call.result()


#: For callers that have none.
ALONE = Hands(1)
