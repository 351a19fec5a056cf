"""How often, and after which pauses, a source that failed is tried again."""

from __future__ import annotations

from lora_cache.errors import SourceError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
LONGEST_RETRY_AFTER_S = 30.0  # a source that asks for more is reported instead


class Patience:
    """For one piece of work.

    Args:
        attempts: in a row without progress.
    """

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._failed = 0

    def pause_after(self, error: SourceError, *, progress: bool = False) -> float:
        """Seconds to wait before the next attempt.

        Args:
            progress: the attempt that failed has brought the work forward.

        Raises:
            SourceError: `error`: there is no next attempt.
        """
        self._failed = 1 if progress else self._failed + 1
        if self._failed >= self._attempts or error.retry_after_s > LONGEST_RETRY_AFTER_S:
            raise error
        pause_s = min(FIRST_PAUSE_S * 2.0 ** (self._failed - 1), LONGEST_PAUSE_S)
        return float(max(pause_s, error.retry_after_s))
