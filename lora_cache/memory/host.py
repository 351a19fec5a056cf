"""Host memory: what is left of it for this process, and what a process has locked.

Read from ``/proc`` and ``/sys/fs/cgroup``; where the kernel does not say, the answer is None.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2 ** 63


@dataclass(frozen=True, slots=True)
class HostMemory:
    """In bytes.

    Attributes:
        total: of the machine, or the limit of the control group if that is smaller.
        available: what can still be had without swapping: the least of what the machine has and
            what each control group above this process still allows.
        limited_by: ``"machine"``, or the control group that allows the least.
    """

    total: int
    available: int
    limited_by: str = "machine"

    @property
    def share(self) -> float:
        """How much of it is in use, 0 to 1."""
        return min(1.0, max(0.0, 1 - self.available / self.total)) if self.total else 1.0


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What one process has, in bytes; 0 where the kernel does not count it.

    Attributes:
        resident: in RAM (VmRSS), of which `shared` is shared memory.
        locked: by ``mlock`` (VmLck).
        page_locked: by drivers, for transfers (VmPin).  The kernel leaves it to each driver whether
            it counts its pages here: 0 does not prove that there are none.
    """

    resident: int
    shared: int
    locked: int
    page_locked: int


@dataclass(frozen=True, slots=True)
class _Group:
    """A control group, of version 1 or 2: the files that say what it allows and uses."""

    name: str
    limits: tuple[Path, ...]
    usage: Path
    stat: Path
    inactive: bytes  # the field of `stat` that holds what is given up first

    def allows(self) -> tuple[int, int] | None:
        """Its limit, and what is left of that; None without a limit."""
        limit = min((n for path in self.limits if (n := _number(path)) is not None), default=None)
        if limit is None or limit >= _UNLIMITED:
            return None
        used = _number(self.usage)
        if used is None:
            return None
        # File cache that nobody has used for long is given up before anything fails: Kubernetes
        # reckons its "working set" this way.
        inactive = _field(self.stat, self.inactive) or 0
        return limit, max(0, limit - max(0, used - inactive))


class Host:
    """Reads host memory.  Looks up its control groups once, so make a new one after a move.

    Thread-safe.

    Args:
        root: where ``proc`` and ``sys`` are; for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._groups = _groups(root)

    def read(self) -> HostMemory | None:
        """What is left; None where the kernel does not say."""
        info = _read(self._proc / "meminfo")
        total, available = _kib(info, b"MemTotal:"), _kib(info, b"MemAvailable:")
        if total is None or available is None:
            return None
        found = HostMemory(total, available)
        for group in self._groups:
            if (allowed := group.allows()) is not None and allowed[1] < found.available:
                found = HostMemory(min(total, allowed[0]), allowed[1], group.name)
        return found

    def process(self, pid: int | None = None) -> ProcessMemory | None:
        """What a process has, this one if none is given; None if it is gone or not ours to see."""
        status = _read(self._proc / str(pid or os.getpid()) / "status")
        if (resident := _kib(status, b"VmRSS:")) is None:
            return None
        fields = (b"RssShmem:", b"VmLck:", b"VmPin:")
        return ProcessMemory(resident, *(_kib(status, field) or 0 for field in fields))


def _groups(root: Path) -> list[_Group]:
    """The control groups that limit this process's memory: its own, and all above it."""
    found = []
    for line in _read(root / "proc/self/cgroup").decode(errors="replace").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = 1 if "memory" in controllers.split(",") else 2 if number == "0" else 0
        if version and (mount := _mount(root, version)) is not None:
            top, inside = mount
            # In a container the path may be that of the host: then the mount is all there is.
            below = Path(path).relative_to(inside) if Path(path).is_relative_to(inside) else Path()
            for part in (below, *below.parents):
                found.append(_group(version, top / part, "/" if part == Path() else f"/{part}"))
    return [group for group in found if group.usage.exists()]


def _group(version: int, place: Path, name: str) -> _Group:
    if version == 2:
        limits = (place / "memory.max", place / "memory.high")
        return _Group(
            name, limits, place / "memory.current", place / "memory.stat", b"inactive_file"
        )
    limit, usage = place / "memory.limit_in_bytes", place / "memory.usage_in_bytes"
    return _Group(name, (limit,), usage, place / "memory.stat", b"total_inactive_file")


def _mount(root: Path, version: int) -> tuple[Path, Path] | None:
    """Where the hierarchy is mounted, and which of its groups is at the top of that.

    A line of mountinfo: ``35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory``.
    """
    for line in _read(root / "proc/self/mountinfo").decode(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if len(before) < 5 or len(after) < 3:
            continue
        is_v1 = after[0] == "cgroup" and "memory" in after[2].split(",")
        if (version == 2 and after[0] == "cgroup2") or (version == 1 and is_v1):
            return root / before[4].lstrip("/"), Path(before[3])
    return None


def _read(path: Path) -> bytes:
    """The file, or nothing: whoever looks for a field in it finds none."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _number(path: Path) -> int | None:
    try:
        return int(_read(path))
    except ValueError:  # "max", or no such file
        return None


def _field(path: Path, name: bytes) -> int | None:
    return _after(_read(path), name + b" ")


def _kib(text: bytes, name: bytes) -> int | None:
    number = _after(text, name)
    return None if number is None else number * 1024


def _after(text: bytes, name: bytes) -> int | None:
    """The number on the line that starts with `name`."""
    start = 0 if text.startswith(name) else text.find(b"\n" + name) + 1
    if not start and not text.startswith(name):
        return None
    words = text[start + len(name) : start + len(name) + 40].split(None, 1)
    return int(words[0]) if words and words[0].isdigit() else None
