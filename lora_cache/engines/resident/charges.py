"""What adapters take in host memory, reckoned before they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from lora_cache.engines.resident.layout import Contents, Layout
from lora_cache.manifest import Manifest

_MOST_KINDS = 4096  # of rank and targets, whose bytes are remembered


class Charges:
    """How many bytes the images of an adapter have at most, over all workers.

    Exact for an adapter of one rank that targets its modules in every layer, as most do.

    Args:
        layouts: one a worker.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self._layouts = layouts
        self._kinds = frozenset(_kind(source) for layout in layouts for source in layout.sources)
        self._reckoned = lru_cache(_MOST_KINDS)(self._reckon)

    def of(self, manifest: Manifest) -> int:
        """The bytes of all images together.

        An adapter with modules of unknown names may be one that only vLLM's loader knows: it is
        taken for one that has everything, and for no less than its file.
        """
        if self._kinds.issuperset(manifest.target_modules):
            return self._reckoned(manifest.rank, manifest.target_modules)
        everything = self._reckoned(manifest.rank, tuple(self._kinds))
        return max(everything, manifest.nbytes * len(self._layouts))

    def _reckon(self, rank: int, targets: tuple[str, ...]) -> int:
        return sum(layout.nbytes(_contents(layout, rank, targets)) for layout in self._layouts)


def _contents(layout: Layout, rank: int, targets: tuple[str, ...]) -> Contents:
    """Of an image with these modules in every layer."""
    there = {index for index, source in enumerate(layout.sources) if _kind(source) in targets}
    return Contents.of(rank, there, len(layout.sources))


def _kind(module: str) -> str:
    """``model.layers.0.self_attn.q_proj`` → ``q_proj``, as manifests name them."""
    return module.rpartition(".")[2]
