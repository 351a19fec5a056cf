"""Page-locking of images: what CUDA may read by itself, without a copy by the CPU.

Images are locked and not the arena, so that what is freed can go back to the system, and nothing
is locked that is not used.  CUDA locks pages under a lock that every kernel launch needs, too, and
gives it back unfairly: a step waits for as long as locking goes on (3 ms for 100 MB on an H100, and
twenty times that where the pages were never touched).  So an image is locked piece by piece with
pauses in between, and its pages are brought in before.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import torch

from lora_cache.engines.resident.pages import populate

logger = logging.getLogger(__name__)

#: Half a millisecond of locking, a third of one of copying.
PIECE_BYTES = 16 << 20

#: Enough for a step that waits to get through.
_PAUSE_S = 1e-3

#: cudaHostRegister's flag for memory that every context may use.
_PORTABLE = 1


class PageLocks:
    """The locked stretches of one mapping.  Thread-safe; `lock` takes milliseconds.

    Args:
        base: the address at which the mapping starts.
    """

    def __init__(self, base: int) -> None:
        self._base = base
        self._pieces: dict[int, list[tuple[int, int]]] = {}  # offset of an image → its pieces
        self._changing = threading.Lock()
        self._refused = False

    def lock(self, offset: int, nbytes: int) -> None:
        """Page-lock an image.

        Where CUDA refuses, a warning is logged once, and the image is copied through CUDA's own
        buffers: slower, and just as right.
        """
        with self._changing:
            locked: list[tuple[int, int]] = []
            for start in range(offset, offset + nbytes, PIECE_BYTES):
                length = min(PIECE_BYTES, offset + nbytes - start)
                address = self._base + start
                populate(address, length)
                status = int(_cudart().cudaHostRegister(address, length, _PORTABLE))
                if status:
                    self._refuse(status)
                    self._unlock(locked)
                    return
                locked.append((start, length))
                time.sleep(_PAUSE_S)
            self._pieces[offset] = locked

    def unlock(self, offset: int) -> None:
        """Undo `lock`; of an image that is not locked, nothing."""
        with self._changing:
            self._unlock(self._pieces.pop(offset, []), _PAUSE_S)

    def close(self) -> None:
        """Unlock everything."""
        with self._changing:
            for pieces in self._pieces.values():
                self._unlock(pieces)
            self._pieces.clear()

    def pieces(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """The (start, length) that may be copied at once: CUDA copies across no seam."""
        return self._pieces.get(offset) or [(offset, nbytes)]

    @property
    def nbytes(self) -> int:
        """Locked bytes."""
        with self._changing:
            return sum(length for pieces in self._pieces.values() for _, length in pieces)

    def _unlock(self, pieces: list[tuple[int, int]], pause_s: float = 0) -> None:
        for start, _ in pieces:
            _cudart().cudaHostUnregister(self._base + start)
            time.sleep(pause_s)

    def _refuse(self, status: int) -> None:
        if not self._refused:
            logger.warning(
                "CUDA cannot page-lock adapters in host memory (error %d): loading them takes "
                "several times as long", status,
            )  # fmt: skip
        self._refused = True


def _cudart() -> Any:
    return torch.cuda.cudart()
