"""How much host memory the images may take."""

from __future__ import annotations

import pytest

from lora_cache.engines.base import Capabilities
from lora_cache.engines.resident.budget import budget
from lora_cache.memory import HostMemory
from tests.resident.layouts import plain_layout

HALF, FULL = plain_layout("bfloat16"), plain_layout("float32")
SLOTS, ENTRIES, SLACK = 3, 10, 4


def image_bytes(*layouts: object) -> int:
    return sum(layout.max_nbytes(layout.max_rank) for layout in layouts)  # type: ignore[attr-defined]


def left(nbytes: int) -> HostMemory:
    return HostMemory(1 << 40, nbytes, "the group")


CAN = Capabilities("fake", SLOTS, ENTRIES, SLOTS, ENTRIES, HALF.max_rank)


def test_enough_memory_sets_no_limit() -> None:
    wanted = (ENTRIES + SLACK) * image_bytes(HALF)
    assert budget([HALF], CAN, None, left(2 * wanted)) == (wanted, None)


@pytest.mark.parametrize(("layouts", "images"), [([HALF], 6), ([FULL], 6), ([HALF, HALF], 6)])
def test_scarce_memory_does(layouts: list, images: int, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[type-arg]
    """Images of as many adapters fit into half of it, with those that are still leaving."""
    largest = image_bytes(*layouts)
    found = budget(layouts, CAN, None, left(2 * (images + SLACK) * largest))
    assert found.host_bytes is not None
    assert found.host_bytes // largest == images
    assert found.arena_bytes >= (images + SLACK) * largest
    assert "the group" in caplog.text


@pytest.mark.parametrize("layout", [HALF, FULL])
@pytest.mark.parametrize("memory", [None, left(0)])
def test_the_slots_can_be_filled_however_little_there_is(
    layout: object, memory: HostMemory | None
) -> None:
    found = budget([layout], CAN, None, memory)  # type: ignore[list-item]
    assert found.host_bytes is not None
    assert found.host_bytes >= SLOTS * image_bytes(layout)
    assert found.arena_bytes >= (SLOTS + SLACK) * image_bytes(layout)


def test_what_is_given_holds() -> None:
    assert budget([HALF], CAN, 1000, left(0)).host_bytes == 1000
