"""Adapters that exist without files."""

from __future__ import annotations

from pathlib import Path

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import AdapterNotFoundError, LoraCacheError
from lora_cache.manifest import Manifest


class FakeSource:
    """Resolves every ref ``AdapterRef("fake", name)``; register it under the name ``"fake"``.

    Args:
        nbytes: of every adapter that is not set otherwise by `add`.
        rank: likewise.
    """

    def __init__(self, nbytes: int = 1 << 20, rank: int = 8) -> None:
        self._nbytes = nbytes
        self._rank = rank
        self._adapters: dict[str, Adapter] = {}
        self._errors: dict[str, LoraCacheError] = {}
        self.resolved = 0

    @staticmethod
    def ref(name: str) -> AdapterRef:
        return AdapterRef("fake", name)

    def add(
        self, name: str, *, nbytes: int | None = None, rank: int | None = None, version: int = 0
    ) -> Adapter:
        """Define an adapter; a new `version` under an old name is a new key."""
        manifest = Manifest(
            rank=rank or self._rank,
            alpha=16.0,
            scaling=16.0 / (rank or self._rank),
            target_modules=("q_proj", "v_proj"),
            widths=(),
            dtypes=("BF16",),
            base_model=None,
            nbytes=self._nbytes if nbytes is None else nbytes,
            tensor_count=4,
        )
        key = AdapterKey(f"fake:{name}:{version}", name)
        self._adapters[name] = Adapter(key, Path("/nonexistent") / name, manifest)
        return self._adapters[name]

    def fail(self, name: str, error: LoraCacheError) -> None:
        """Let `name` be unresolvable."""
        self._errors[name] = error

    def resolve(self, ref: AdapterRef) -> Adapter:
        self.resolved += 1
        if error := self._errors.get(ref.location):
            raise error
        if not ref.location:
            raise AdapterNotFoundError("an adapter needs a name")
        return self._adapters.get(ref.location) or self.add(ref.location)

    def is_current(self, ref: AdapterRef, adapter: Adapter) -> bool:
        return self._adapters.get(ref.location) is adapter
