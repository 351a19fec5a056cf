"""How much host memory the images of adapters may take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from lora_cache.engines.base import Capabilities
from lora_cache.engines.resident.layout import Layout
from lora_cache.memory import HostMemory

logger = logging.getLogger(__name__)

#: Bytes of the arena for each of its images: images come and go, and it may be in pieces.
_PIECES = 2
#: Images beyond the budget: a newcomer is packed before its victim leaves.
_SLACK_IMAGES = 4


class Budget(NamedTuple):
    """In bytes.

    Attributes:
        arena_bytes: of the arena; memory is taken only as images are written.
        host_bytes: what images may take; None: as much as ``max_cpu_loras`` of them need.
    """

    arena_bytes: int
    host_bytes: int | None


def budget(
    layouts: Sequence[Layout],
    capabilities: Capabilities,
    host_bytes: int | None,
    memory: HostMemory | None,
) -> Budget:
    """How much the images may take.

    Args:
        layouts: one a worker.
        host_bytes: what the caller wants, if anything.  Otherwise they may take half of what is
            left of the memory, but at least the slots' worth.
        memory: what is left; None if that is not known.
    """
    largest = sum(layout.max_nbytes(layout.max_rank) for layout in layouts)
    slack = largest * _SLACK_IMAGES
    wanted = largest * capabilities.host_entries + slack
    if host_bytes is None:
        half = memory.available // 2 if memory else 0
        if wanted <= half:
            return Budget(wanted, None)
        host_bytes = max(half - slack, largest * capabilities.slots)
        logger.warning(
            "max_cpu_loras=%d adapters of the largest rank would need %.1f GB of host memory, and "
            "half of what is left is %.1f GB (%s): %.1f GB of adapters are held at most; say how "
            "much you want with host_bytes",
            capabilities.host_entries, wanted / 1e9, half / 1e9,
            memory.limited_by if memory else "not known", host_bytes / 1e9,
        )  # fmt: skip
    return Budget(min(wanted, _PIECES * host_bytes + slack), host_bytes)
