"""Digests of files, small and large."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from lora_cache.sources import content
from lora_cache.sources.content import content_digest


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_PIECE_BYTES", 64)
    monkeypatch.setattr(content, "_LARGE_BYTES", 256)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_small_file_has_the_digest_that_everybody_gives_it(tmp_path: Path) -> None:
    for size in (0, 1, 255):
        data = os.urandom(size)
        assert content_digest(write(tmp_path / "f", data)) == blake3(data).digest()


@pytest.mark.parametrize("size", [256, 257, 319, 320, 1000])
def test_any_change_of_a_large_one_is_seen(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * 4
    found = {content_digest(write(tmp_path / "f", data[:size]))}
    for at in range(0, size, 7):
        changed = bytearray(data[:size])
        changed[at] ^= 1
        found.add(content_digest(write(tmp_path / "f", bytes(changed))))
    swapped = data[64:128] + data[:64] + data[128:size]
    found |= {content_digest(write(tmp_path / "f", each)) for each in (swapped, data[: size - 1])}
    assert len(found) == 3 + len(range(0, size, 7))


def test_the_number_of_threads_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "f", os.urandom(5000))
    found = set()
    for cores in (1, 8, 12, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        found.add(content_digest(path))
    assert len(found) == 1


def test_a_file_that_is_cut_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "f", os.urandom(5000))
    size = os.stat(path).st_size

    def cut(_: int) -> set[int]:
        os.truncate(path, size - 1)
        return {0}

    monkeypatch.setattr(os, "sched_getaffinity", cut)
    with pytest.raises(EOFError):
        content_digest(path)
