"""The processes of one server, and what they hold together: a vLLM is several processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_cache.memory.host import Host

_ARENA = "/memfd:lora-cache-arena"


@dataclass(frozen=True, slots=True)
class FamilyMemory:
    """In bytes, of all processes together.

    Attributes:
        pids: a process, its children, theirs, …
        private: resident memory of each that is not shared.
        shared: resident shared memory, of the one that has most: they share it with one another.
        locked: by ``mlock``.
        page_locked: by drivers; see `ProcessMemory`.
        arena: taken by the resident engine's packed adapters; None if there is none.
    """

    pids: tuple[int, ...]
    private: int
    shared: int
    locked: int
    page_locked: int
    arena: int | None


def family(pid: int, proc: Path = Path("/proc")) -> tuple[int, ...]:
    """`pid` and all processes below it, as far as they can be seen."""
    children: dict[int, list[int]] = {}
    for path in proc.iterdir():
        if path.name.isdigit() and (parent := _parent(path)) is not None:
            children.setdefault(parent, []).append(int(path.name))
    found = [pid]
    for member in found:  # grows as it goes
        found += sorted(children.get(member, ()))
    return tuple(found)


def family_memory(pid: int) -> FamilyMemory:
    """What a server's processes hold."""
    pids = family(pid)
    host = Host()
    known = [memory for member in pids if (memory := host.process(member)) is not None]
    return FamilyMemory(
        pids=pids,
        private=sum(memory.resident - memory.shared for memory in known),
        shared=max((memory.shared for memory in known), default=0),
        locked=sum(memory.locked for memory in known),
        page_locked=sum(memory.page_locked for memory in known),
        arena=_arena(pids),
    )


def _arena(pids: Iterable[int]) -> int | None:
    """Bytes that are really taken of the arena: what was never written costs nothing."""
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    if os.readlink(descriptor).startswith(_ARENA):
                        return descriptor.stat().st_blocks * 512
    return None


def _parent(path: Path) -> int | None:
    try:
        # The name in parentheses may contain anything, parentheses too.
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
