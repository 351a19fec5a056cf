"""NaN and infinity are found in every dtype, wherever they lie; and only when asked for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from lora_cache import AsyncLoraCache
from lora_cache.errors import InvalidAdapterError
from lora_cache.manifest import CONFIG_FILE, WEIGHTS_FILE
from lora_cache.testing import FakeEngine
from lora_cache.weights import check_finite

#: The bytes of NaN, infinity and −infinity, and of numbers that are nearly those.
BAD = {
    "F64": ["7ff8000000000000", "7ff0000000000000", "fff0000000000000"],
    "F32": ["7fc00000", "7f800000", "ff800000"],
    "F16": ["7e00", "7c00", "fc00"],
    "BF16": ["7fc0", "7f80", "ff80"],
    "F8_E5M2": ["7f", "7c", "fc"],
    "F8_E4M3": ["7f", "ff"],
}
LARGEST = {
    "F64": "7fefffffffffffff",
    "F32": "ff7fffff",
    "F16": "7bff",
    "BF16": "ff7f",
    "F8_E5M2": "7b",
    "F8_E4M3": "fe",
    "I8": "7f",
}


def write(directory: Path, dtype: str, numbers: list[str]) -> Path:
    """An adapter whose `lora_A` is one row of these numbers; `lora_B` is zero."""
    row = b"".join(bytes.fromhex(number)[::-1] for number in numbers)
    item = len(row) // len(numbers)
    name = "base_model.model.layers.0.self_attn.q_proj"
    header = {
        f"{name}.lora_A.weight": {
            "dtype": dtype,
            "shape": [1, len(numbers)],
            "data_offsets": [0, len(row)],
        },
        f"{name}.lora_B.weight": {
            "dtype": dtype,
            "shape": [1, 1],
            "data_offsets": [len(row), len(row) + item],
        },
    }
    raw = json.dumps(header).encode()
    directory.mkdir()
    (directory / WEIGHTS_FILE).write_bytes(len(raw).to_bytes(8, "little") + raw + row + bytes(item))
    (directory / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    return directory


@pytest.mark.parametrize("dtype", BAD)
def test_one_bad_number_is_found(tmp_path: Path, dtype: str) -> None:
    for index, number in enumerate(BAD[dtype]):
        row = [LARGEST[dtype]] * 5
        row[index] = number
        adapter = write(tmp_path / number, dtype, row)
        with pytest.raises(InvalidAdapterError, match=r"q_proj\.lora_A\.weight holds NaN or inf"):
            check_finite(adapter)


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_numbers_are_fine(tmp_path: Path, dtype: str) -> None:
    check_finite(write(tmp_path / "a", dtype, [LARGEST[dtype], LARGEST[dtype]]))


def test_the_last_number_of_a_large_tensor(tmp_path: Path) -> None:
    """Beyond the first chunk, and at the end of one that is not full."""
    numbers = (4 << 20) // 2 + 7
    adapter = write(tmp_path / "a", "F16", ["3c00"] * numbers)
    check_finite(adapter)
    path = adapter / WEIGHTS_FILE
    raw = bytearray(path.read_bytes())
    raw[-4:-2] = np.float16(np.nan).tobytes()  # the last two bytes are lora_B
    path.write_bytes(raw)
    with pytest.raises(InvalidAdapterError, match="holds NaN"):
        check_finite(adapter)


def test_a_file_that_went_away_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterError, match="cannot be read"):
        check_finite(tmp_path)


async def prefetch(path: Path, *, check_weights: bool) -> None:
    cache = AsyncLoraCache(FakeEngine(), check_weights=check_weights, publish=False)
    async with cache:
        await cache.prefetch(path, tier="disk")


def test_a_cache_looks_on_request_only(tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", "BF16", ["7fc0", "0000"])
    asyncio.run(prefetch(adapter, check_weights=False))
    with pytest.raises(InvalidAdapterError, match="check_weights"):
        asyncio.run(prefetch(adapter, check_weights=True))
