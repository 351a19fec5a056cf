"""The processes of a server, and what they hold together."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from lora_cache.memory.family import family, family_memory

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
input()
child.communicate(b"\\n")
"""


def test_a_process_and_all_below_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert family(parent.pid) == (parent.pid, child)
        assert {parent.pid, child} <= set(family(os.getpid()))
        held = family_memory(parent.pid)
        assert held.pids == (parent.pid, child)
        assert held.private > 2 << 20
        assert held.arena is None
        parent.communicate("\n")
    gone = family_memory(parent.pid)
    assert (gone.pids, gone.private, gone.shared) == ((parent.pid,), 0, 0)


def test_what_is_no_process_is_skipped(tmp_path: Path) -> None:
    for name, stat in (("1", "1 (a) S 0"), ("7", "7 (a b) c) S 1 1"), ("8", "odd"), ("x", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stat").write_text(stat)
    (tmp_path / "9").mkdir()
    assert family(1, tmp_path) == (1, 7)


def test_only_written_pages_of_an_arena_count() -> None:
    fd = os.memfd_create("lora-cache-arena")
    try:
        os.ftruncate(fd, 64 << 20)
        assert family_memory(os.getpid()).arena == 0
        with mmap.mmap(fd, 64 << 20) as pages:
            pages.write(b"x" * (3 << 20))
            assert family_memory(os.getpid()).arena == 3 << 20
    finally:
        os.close(fd)
