"""The arena: no byte belongs to two images, none is lost, what is freed costs no memory."""

from __future__ import annotations

import os
import random
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.engines.resident.arena import PAGE, Arena, ArenaFullError


@given(st.lists(st.integers(1, 5 * PAGE), max_size=40), st.integers(0, 2**32))
def test_stretches_are_apart_and_come_back_whole(sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    arena = Arena(24 * PAGE)
    try:
        held: dict[int, int] = {}
        for nbytes in sizes:
            try:
                offset = arena.allocate(nbytes)
            except ArenaFullError:
                if held:
                    arena.free(held.popitem()[0])
                continue
            assert offset % PAGE == 0
            assert all(offset >= o + n or offset + nbytes <= o for o, n in held.items())
            held[offset] = nbytes
            if rng.random() < 0.4:
                offset = rng.choice(list(held))
                del held[offset]
                arena.free(offset)
            arena.check()
        for offset in held:
            arena.free(offset)
        arena.check()
        assert arena.used == 0
        assert arena.allocate(24 * PAGE) == 0, "all of it, in one stretch"
    finally:
        arena.close()


def test_others_run_while_memory_is_given_back() -> None:
    """A server's requests, in the same process: the interpreter's lock is not held."""
    nbytes = 32 << 20
    arena = Arena(8 * nbytes)
    overtaken = 0
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # who has the lock keeps it until it waits for the system
    try:
        for offset in [arena.allocate(nbytes) for _ in range(8)]:
            os.pwrite(arena.fd, bytes(nbytes), offset)
            begun, ended = threading.Event(), threading.Event()

            def discard(offset: int = offset, begun: Any = begun, ended: Any = ended) -> None:
                begun.set()
                arena.discard(offset)
                ended.set()

            thread = threading.Thread(target=discard)
            thread.start()
            begun.wait()
            overtaken += not ended.is_set()
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        arena.close()
    assert overtaken


def test_a_full_arena_says_how_full() -> None:
    arena = Arena(4 * PAGE)
    arena.allocate(3 * PAGE)
    with pytest.raises(ArenaFullError, match=f"{2 * PAGE} bytes do not fit"):
        arena.allocate(2 * PAGE)
    arena.close()


def test_memory_is_taken_when_written_and_given_back_when_discarded() -> None:
    arena = Arena(1 << 40)  # more than any machine has
    offset = arena.allocate(64 * PAGE)
    with open(arena.path, "r+b") as other:  # as another process does
        other.seek(offset)
        other.write(b"x" * 64 * PAGE)
    assert os.fstat(arena.fd).st_blocks * 512 >= 64 * PAGE
    behind = arena.allocate(PAGE)
    os.pwrite(arena.fd, b"y", behind)
    arena.discard(offset)
    assert os.fstat(arena.fd).st_blocks * 512 == PAGE, "nothing else has gone"
    assert arena.used == 65 * PAGE, "it is still taken"
    arena.free(offset)
    arena.close()
    assert not os.path.exists(arena.path)
