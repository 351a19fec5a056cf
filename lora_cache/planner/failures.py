"""Failed loads are remembered for a while, so that requests fail fast instead of loading again."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

from lora_cache.errors import LoadFailedError, LoraCacheError
from lora_cache.key import AdapterKey

_MANY = 1024


@dataclass(frozen=True, slots=True)
class _Failure:
    error: LoraCacheError
    until: float
    attempts: int


class Failures:
    """Exponential back-off per key: `retry_s`, doubled with each failure, up to `retry_max_s`."""

    def __init__(self, retry_s: float, retry_max_s: float) -> None:
        self._retry_s = retry_s
        self._retry_max_s = retry_max_s
        self._failures: dict[AdapterKey, _Failure] = {}

    def add(self, key: AdapterKey, error: LoraCacheError, now: float) -> LoraCacheError:
        """Remember a failure.  Returns the error, which now says when a retry makes sense."""
        before = self._failures.get(key)
        attempts = before.attempts + 1 if before else 1
        # The exponent is bounded because floats are: 2.0 ** 1024 overflows.
        delay_s = min(self._retry_s * 2.0 ** min(attempts - 1, 64), self._retry_max_s)
        if len(self._failures) >= _MANY:  # forget what expired long ago
            old = now - self._retry_max_s
            self._failures = {k: f for k, f in self._failures.items() if f.until > old}
        self._failures[key] = _Failure(error, now + delay_s, attempts)
        return again(error, delay_s)

    def forget(self, key: AdapterKey) -> None:
        self._failures.pop(key, None)

    def until(self, key: AdapterKey, now: float) -> float | None:
        """When the back-off of `key` ends, if one is on."""
        failure = self._failures.get(key)
        return failure.until if failure is not None and failure.until > now else None

    def standing(self, key: AdapterKey, now: float) -> LoraCacheError | None:
        """The error to repeat while the back-off lasts."""
        failure = self._failures.get(key)
        if failure is None or now >= failure.until:
            return None
        return again(failure.error, failure.until - now)


def again(error: LoraCacheError, retry_after_s: float | None = None) -> LoraCacheError:
    """A copy of `error`: raised in several tasks, each needs a traceback of its own."""
    twin = copy(error)
    twin.__cause__ = error.__cause__
    if retry_after_s is not None and isinstance(twin, LoadFailedError):
        twin.retry_after_s = retry_after_s
    return twin
