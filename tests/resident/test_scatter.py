"""The kernel that writes slots on a GPU, run by Triton's interpreter.

In a process of its own: the interpreter is chosen by an environment variable before Triton loads.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SLOTS, DIRT = 3, 7.0


@pytest.mark.long
def test_every_number_of_a_slot_is_written_and_none_of_another() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.resident.test_scatter"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["checked", "24"]


def check(rng: random.Random) -> None:
    """Random tensors, some without a piece, pieces of any size, whatever lay in the slots."""
    import torch

    from lora_cache.engines.resident.scatter import Place, Scatter

    dtype = rng.choice([torch.bfloat16, torch.float32, torch.float16])
    align = 64 // torch.empty((), dtype=dtype).element_size()
    tensors, places, offset = [], [], 0
    for number in range(rng.randint(1, 6)):
        # Widths that are no multiple of 16 bytes forbid wide accesses.
        height, width = rng.choice([1, 8, 64, 300]), rng.choice([1, 8, 16, 33, 300])
        tensors.append(torch.full((SLOTS, 1, height, width), DIRT, dtype=dtype))
        if rng.random() < 0.8:
            rows = rng.choice([height, rng.randint(1, height)])
            columns = rng.choice([width, rng.randint(1, width)])
            places.append(Place(number, rows, columns, offset))
            offset += -(-rows * columns // align) * align
    image = torch.randn(max(offset, 1)).to(dtype)
    slot = rng.randrange(SLOTS)
    scatter = Scatter(tensors)
    scatter.write(slot, image.view(torch.uint8), scatter.table(places))
    expected: list[Any] = [torch.zeros_like(tensor[0, 0]) for tensor in tensors]
    for place in places:
        piece = image[place.offset : place.offset + place.rows * place.columns]
        into = expected[place.tensor][: place.rows, : place.columns]
        into.copy_(piece.view(place.rows, place.columns))
    for tensor, wanted in zip(tensors, expected, strict=True):
        for index in range(SLOTS):
            held = tensor[index, 0]
            assert torch.equal(held, wanted if index == slot else torch.full_like(held, DIRT))


if __name__ == "__main__":
    for seed in range(24):
        check(random.Random(seed))
    print("checked 24")
