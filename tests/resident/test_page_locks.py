"""Page-locking, against a CUDA that keeps books (a real one is strict about the same things)."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch

from lora_cache.engines.resident import page_locks
from lora_cache.engines.resident.page_locks import PIECE_BYTES, PageLocks

PAGE = mmap.PAGESIZE


class Cuda:
    """What is registered: addresses and lengths, whole pages, none twice."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.left = 1 << 60

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert address % PAGE == 0
        assert flags == 1
        for start, length in self.registered.items():
            assert address + nbytes <= start or start + length <= address, "registered twice"
        if sum(self.registered.values()) + nbytes > self.left:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(page_locks, "_cudart", lambda: fake)
    monkeypatch.setattr(page_locks, "_PAUSE_S", 0)
    return fake


@pytest.fixture
def base() -> Iterator[int]:
    with mmap.mmap(-1, 4 * PIECE_BYTES) as memory:
        view = torch.frombuffer(memory, dtype=torch.uint8)
        yield view.data_ptr()
        del view


def test_an_image_is_locked_in_pieces_that_cover_it_once(cuda: Cuda, base: int) -> None:
    locks = PageLocks(base)
    nbytes = 2 * PIECE_BYTES + 3 * PAGE
    locks.lock(PAGE, nbytes)
    pieces = locks.pieces(PAGE, nbytes)
    assert [start for start, _ in pieces] == [PAGE, PAGE + PIECE_BYTES, PAGE + 2 * PIECE_BYTES]
    assert sum(length for _, length in pieces) == nbytes == locks.nbytes
    assert cuda.registered == {base + start: length for start, length in pieces}


def test_unlocked_is_unlocked_alone_and_once(cuda: Cuda, base: int) -> None:
    locks = PageLocks(base)
    locks.lock(0, PAGE)
    locks.lock(PAGE, PAGE)
    locks.unlock(0)
    locks.unlock(0)
    assert cuda.registered == {base + PAGE: PAGE}
    locks.lock(0, 1)
    locks.close()
    assert not cuda.registered
    assert locks.nbytes == 0


def test_a_refusal_leaves_nothing_half_locked_and_is_said_once(
    cuda: Cuda, base: int, caplog: pytest.LogCaptureFixture
) -> None:
    locks = PageLocks(base)
    cuda.left = PIECE_BYTES
    for _ in range(2):
        locks.lock(0, 2 * PIECE_BYTES)
        assert not cuda.registered
        assert locks.pieces(0, 2 * PIECE_BYTES) == [(0, 2 * PIECE_BYTES)]
    assert caplog.text.count("cannot page-lock") == 1
