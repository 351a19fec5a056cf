"""What the cache needs of a source."""

from __future__ import annotations

from typing import Protocol

from lora_cache.adapter import Adapter, AdapterRef


class Source(Protocol):
    """Resolves refs of one kind (``ref.source`` names it)."""

    def resolve(self, ref: AdapterRef) -> Adapter:
        """Find, read and validate the adapter.  Blocking; called in a worker thread.

        Raises:
            AdapterError: it is missing, malformed, or of a kind that cannot be served.
        """
        ...

    def is_current(self, ref: AdapterRef, adapter: Adapter) -> bool:
        """Whether `ref` still means `adapter`.  Called for every request: microseconds, no read."""
        ...
