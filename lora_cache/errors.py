"""Every error this package raises, as one tree.

```text
LoraCacheError
├── ConfigError              a setting contradicts another one, or the engine
│   └── MissingExtraError    an optional part is not installed
├── AdapterError             this adapter cannot be served, whoever asks
│   ├── AdapterNotFoundError
│   ├── InvalidAdapterError      the files are damaged or malformed
│   ├── UnsupportedAdapterError  the files are fine, the engine cannot use them
│   ├── AccessDeniedError        private, gated, or of an organisation that is not allowed
│   └── AdapterChangedError      the files changed while they were being read
├── EngineError              vLLM refused or failed
│   ├── LoadFailedError          one adapter could not be loaded; the engine lives
│   ├── CannotPackError          the fast path does not know this adapter; vLLM's loader may
│   ├── RequestRefusedError      vLLM refused one request (also a ValueError)
│   └── EngineDeadError          the engine is gone; the cache must be rebuilt
├── SourceError              the Hub did not answer, or not as it should; try again
├── StoreError               the disk tier cannot be read or written
│   └── DiskFullError            no room for one more adapter on disk
├── NoRoomError              staging would disturb others (prefetch reports it instead)
│   └── MemoryPressureError      memory is scarce: no new pins, no speculation, until that is over
├── LeaseTimeoutError        no slot came free in time (also a TimeoutError)
├── PinnedError              a pin forbids it, or one pin too many
└── CacheClosedError
```

A message says what is wrong and what to do about it.  Errors of other packages are mapped
where they enter (``adapter.py``, ``engines/``) and kept as ``__cause__``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_cache.key import AdapterKey
    from lora_cache.state import Tier


class LoraCacheError(Exception):
    """Base of every error of this package.

    Attributes:
        key: the adapter concerned, or None.
        tier: the tier concerned, or None.
    """

    def __init__(
        self, message: str, *, key: AdapterKey | None = None, tier: Tier | None = None
    ) -> None:
        super().__init__(message)
        self.key = key
        self.tier = tier


class ConfigError(LoraCacheError):
    """A setting is unknown, out of range, or contradicts the engine."""


class MissingExtraError(ConfigError):
    """An optional dependency is missing; the message names the extra to install."""


class AdapterError(LoraCacheError):
    """The adapter itself is the problem: retrying without changing it will fail again."""


class AdapterNotFoundError(AdapterError):
    """Nothing lies where the ref points."""


class InvalidAdapterError(AdapterError):
    """The adapter's files are missing parts, truncated, malformed or of a refused format."""


class UnsupportedAdapterError(AdapterError):
    """The adapter is well formed, but this engine cannot serve it (rank, kind, targets, size)."""


class AccessDeniedError(AdapterError):
    """The source does not let us have it, or we are not to have it from there."""


class AdapterChangedError(AdapterError):
    """The adapter's files changed between reading and loading them. Retry."""


class EngineError(LoraCacheError):
    """vLLM refused an operation or failed."""


class LoadFailedError(EngineError):
    """Loading one adapter failed; nothing was evicted and the engine serves on.

    Attributes:
        retry_after_s: seconds until a new attempt is made instead of this error.
    """

    def __init__(
        self,
        message: str,
        *,
        key: AdapterKey | None = None,
        tier: Tier | None = None,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message, key=key, tier=tier)
        self.retry_after_s = retry_after_s


class CannotPackError(EngineError):
    """The packer does not know how this adapter, or this model, is laid out in a slot.

    Nothing is wrong with the adapter: load it through vLLM's own loader, which decides.
    """


class RequestRefusedError(EngineError, ValueError):
    """vLLM refused a request: too long, bad parameters, a malformed prompt.

    Also a ValueError, as vLLM's own was for long: code that was written for it still catches this.
    """


class EngineDeadError(EngineError):
    """The engine process is gone. Build a new engine and a new cache."""


class SourceError(LoraCacheError):
    """A source did not answer, or not as it should. Trying again may help.

    Attributes:
        retry_after_s: seconds that the source asked to wait, or 0.
    """

    def __init__(
        self,
        message: str,
        *,
        key: AdapterKey | None = None,
        tier: Tier | None = None,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message, key=key, tier=tier)
        self.retry_after_s = retry_after_s


class StoreError(LoraCacheError):
    """The disk tier cannot be read or written."""


class DiskFullError(StoreError):
    """No room on disk for one more adapter; what is resident is served on."""


class NoRoomError(LoraCacheError):
    """Speculative staging would have taken a place that others need."""


class MemoryPressureError(NoRoomError):
    """Memory is scarce, so nothing optional is begun: no new pins, no speculative loads.

    Requests are served as before. Try again when the pressure is over.
    """


class LeaseTimeoutError(LoraCacheError, TimeoutError):
    """No slot came free within the caller's timeout."""


class PinnedError(LoraCacheError):
    """A pin forbids the operation, or the pin itself would take the last slot."""


class CacheClosedError(LoraCacheError):
    """The cache is closed, or closing."""
