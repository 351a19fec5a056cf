"""Host memory: this machine's own, and control groups of every kind, written to a directory."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lora_cache.memory import Host

GIB = 1 << 30
MEMINFO = "MemTotal: 67108864 kB\nMemFree: 100 kB\nMemAvailable: 33554432 kB\n"  # 64 and 32 GiB
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"


class Root:
    """A file system with nothing but what is read of it."""

    def __init__(self, path: Path, cgroup: str, mounts: str) -> None:
        self.path = path
        self.write("proc/meminfo", MEMINFO)
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", "1 2 0:1 / / rw - ext4 /dev/x rw\nodd line\n" + mounts)

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)

    def group_v2(self, name: str, limit: int | str, used: int, inactive: int = 0) -> None:
        place = f"sys/fs/cgroup/{name}"
        self.write(f"{place}/memory.max", f"{limit}\n")
        self.write(f"{place}/memory.current", f"{used}\n")
        self.write(f"{place}/memory.stat", f"anon {used}\nfile 9\ninactive_file {inactive}\n")

    def group_v1(self, name: str, limit: int, used: int, inactive: int = 0) -> None:
        place = f"sys/fs/cgroup/memory/{name}"
        self.write(f"{place}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{place}/memory.usage_in_bytes", f"{used}\n")
        # A group's own figure comes before that of the whole tree below it.
        text = f"inactive_file 5\nhierarchical_memory_limit 1\ntotal_inactive_file {inactive}\n"
        self.write(f"{place}/memory.stat", text)

    def read(self) -> tuple[float, float, str]:
        found = Host(self.path).read()
        assert found is not None
        return found.total / GIB, found.available / GIB, found.limited_by


def test_without_control_groups(tmp_path: Path) -> None:
    assert Root(tmp_path, "", "").read() == (64, 32, "machine")


def test_v2_takes_the_least_of_all_groups_above(tmp_path: Path) -> None:
    root = Root(tmp_path, "0::/pod/app\n", V2_MOUNT.format(top="/"))
    root.group_v2("pod/app", "max", GIB)
    root.group_v2("pod", 20 * GIB, 14 * GIB, inactive=2 * GIB)
    assert root.read() == (20, 8, "/pod")
    root.group_v2("pod/app", 10 * GIB, 9 * GIB)
    assert root.read() == (10, 1, "/pod/app")
    root.group_v2("pod/app", 10 * GIB, 11 * GIB)
    assert root.read() == (10, 0, "/pod/app"), "it is over its limit"
    root.group_v2("pod/app", 60 * GIB, 1 * GIB)
    root.group_v2("pod", 60 * GIB, 1 * GIB)
    assert root.read() == (64, 32, "machine")


def test_v2_where_a_group_is_slowed_down_before_its_limit(tmp_path: Path) -> None:
    root = Root(tmp_path, "0::/app\n", V2_MOUNT.format(top="/"))
    root.group_v2("app", 20 * GIB, 4 * GIB)
    root.write("sys/fs/cgroup/app/memory.high", f"{6 * GIB}\n")
    assert root.read() == (6, 2, "/app")


def test_v1(tmp_path: Path) -> None:
    root = Root(tmp_path, "5:cpu:/x\n4:memory:/app\n0::/\n", V1_MOUNT.format(top="/"))
    root.group_v1("app", 8 * GIB, 5 * GIB, inactive=GIB)
    root.group_v1("", 0x7FFFFFFFFFFFF000, 40 * GIB)
    assert root.read() == (8, 4, "/app")


@pytest.mark.parametrize("path", ["/docker/abc", "/somewhere/else", "/"])
def test_in_a_container_the_mount_is_the_group(tmp_path: Path, path: str) -> None:
    root = Root(tmp_path, f"4:memory:{path}\n", V1_MOUNT.format(top="/docker/abc"))
    root.group_v1("", 8 * GIB, 5 * GIB)
    assert root.read() == (8, 3, "/")


def test_the_share_in_use(tmp_path: Path) -> None:
    root = Root(tmp_path, "0::/app\n", V2_MOUNT.format(top="/"))
    root.group_v2("app", 8 * GIB, 6 * GIB)
    found = Host(tmp_path).read()
    assert found is not None
    assert found.share == 0.75


def test_where_the_kernel_says_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path)
    assert host.read() is None
    assert host.process() is None


def test_this_machine() -> None:
    found, memory = Host().read(), psutil.virtual_memory()
    assert found is not None
    assert found.total <= memory.total
    assert found.available <= memory.available + (256 << 20)
    assert 0 <= found.share <= 1


def test_this_process_and_others() -> None:
    host = Host()
    mine = host.process()
    assert mine is not None
    assert mine.resident == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert host.process(other.pid) is not None
        other.communicate(b"\n")
    assert host.process(other.pid) is None


def test_locked_pages_are_counted() -> None:
    size = 16 << 10  # within the limit of any user
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, size) as pages:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        before = Host().process()
        if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
            pytest.skip(f"mlock is refused here: {os.strerror(ctypes.get_errno())}")
        after = Host().process()
        libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(size))
    assert before is not None
    assert after is not None
    assert after.locked - before.locked == size


def test_shared_memory_is_told_apart() -> None:
    with mmap.mmap(-1, 8 << 20) as pages:  # anonymous and shared
        before = Host().process()
        pages.write(b"x" * (8 << 20))
        after = Host().process()
    assert before is not None
    assert after is not None
    assert after.shared - before.shared >= 7 << 20
