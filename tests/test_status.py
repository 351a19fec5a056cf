from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache
from lora_cache.status import StatusFile, read_status, status_dir
from lora_cache.testing import FakeEngine, FakeSource

PERIOD_S = 0.02


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CACHE_STATUS_DIR", str(tmp_path))
    return tmp_path / "lora-cache"


def make_cache() -> AsyncLoraCache:
    # Not published by the cache itself: these tests do it.
    return AsyncLoraCache(FakeEngine(), sources={"fake": FakeSource()}, publish=False)


async def until_written(
    file: StatusFile, wanted: Callable[[dict[str, Any]], bool] = lambda record: True
) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            if file.path.exists():
                record: dict[str, Any] = json.loads(file.path.read_text())
                if wanted(record):
                    return record
            await asyncio.sleep(PERIOD_S / 4)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_behind(directory: Path, name: str, **changes: Any) -> Path:
    record: dict[str, Any] = {
        "pid": os.getpid(),
        "process_start": None,
        "started_at": 1.0,
        "updated_at": 2.0,
        "version": "0",
        "engine": "fake",
        "stats": {},
        "snapshot": {},
    }
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(json.dumps({**record, **changes}))
    return path


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def leases(record: dict[str, Any]) -> list[int]:
    return [adapter["leases"] for adapter in record["snapshot"]["adapters"]]


async def write_and_read() -> None:
    async with make_cache() as cache, StatusFile(cache, period_s=PERIOD_S) as file:
        async with cache.lease(FakeSource.ref("a")):
            # It may have been written before the lease was there, too.
            written = await until_written(file, lambda record: leases(record) == [1])
            assert read_status() == [written]
        assert written["pid"] == os.getpid()
        assert written["engine"] == "fake"
        assert written["started_at"] <= written["updated_at"]
        assert written["stats"]["requests"] == 1
        adapter = written["snapshot"]["adapters"][0]
        assert (adapter["name"], adapter["tier"], adapter["leases"]) == ("a", "gpu", 1)

        later = await until_written(file, lambda record: leases(record) == [0])
        assert later["updated_at"] > written["updated_at"]
    assert not file.path.exists()
    assert read_status() == []


def test_what_is_written_can_be_read_and_goes_away() -> None:
    asyncio.run(write_and_read())


def test_only_the_user_can_read_it(runtime_dir: Path) -> None:
    async def main() -> None:
        async with make_cache() as cache, StatusFile(cache, period_s=PERIOD_S) as file:
            await until_written(file)
            assert permissions(file.path) == 0o600
            assert permissions(runtime_dir) == 0o700
            assert os.listdir(runtime_dir) == [file.path.name]

    asyncio.run(main())


def test_nothing_is_written_while_nothing_changes() -> None:
    async def main() -> None:
        async with (
            make_cache() as cache,
            cache.lease(FakeSource.ref("a")),
            StatusFile(cache, period_s=PERIOD_S) as file,
        ):
            before = await until_written(file)
            await asyncio.sleep(5 * PERIOD_S)  # `since_s` grows; that is no news
            assert json.loads(file.path.read_text()) == before

    asyncio.run(main())


def test_a_name_that_is_no_text_is_shown_too() -> None:
    """Of a directory whose name is not UTF-8."""

    async def main() -> None:
        async with make_cache() as cache, StatusFile(cache, period_s=PERIOD_S) as file:
            async with cache.lease(FakeSource.ref("a\udcff")):
                record = await until_written(file, lambda record: leases(record) == [1])
            assert record["snapshot"]["adapters"][0]["name"] == "a\udcff"

    asyncio.run(main())


def test_what_takes_long_to_draw_is_drawn_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests stand still meanwhile."""
    drawn = 0

    async def main() -> None:
        async with make_cache() as cache:
            snapshot = cache.snapshot

            def slowly() -> Any:
                nonlocal drawn
                drawn += 1
                time.sleep(0.05)
                return snapshot()

            monkeypatch.setattr(cache, "snapshot", slowly)
            async with StatusFile(cache, period_s=PERIOD_S) as file:
                await until_written(file)
                await asyncio.sleep(20 * PERIOD_S)

    asyncio.run(main())
    assert drawn == 1


def test_nothing_is_written_before_the_first_period_has_passed() -> None:
    async def main() -> None:
        async with make_cache() as cache, StatusFile(cache, period_s=60) as file:
            await asyncio.sleep(2 * PERIOD_S)
            assert not file.path.exists()

    asyncio.run(main())


def test_two_caches_of_one_process_have_two_files() -> None:
    async def main() -> None:
        async with (
            make_cache() as one,
            make_cache() as two,
            StatusFile(one, period_s=PERIOD_S) as a,
            StatusFile(two, period_s=PERIOD_S) as b,
        ):
            await until_written(a)
            await until_written(b)
            assert len(read_status()) == 2

    asyncio.run(main())


def test_a_disk_that_refuses_is_logged_once(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime_dir.write_text("a file where the directory should be")

    async def main() -> None:
        async with make_cache() as cache, StatusFile(cache, period_s=PERIOD_S) as file:
            for _ in range(5):
                async with cache.lease(FakeSource.ref("a")):
                    await asyncio.sleep(PERIOD_S)
            await file.close()
            await file.close()

    with caplog.at_level(logging.WARNING, "lora_cache.status"):
        asyncio.run(main())
    assert len(caplog.records) == 1


def test_files_of_the_dead_are_removed(runtime_dir: Path) -> None:
    pid = dead_pid()
    dead = [
        leave_behind(runtime_dir, f"{pid}-1.json", pid=pid),
        leave_behind(runtime_dir, f"{pid}-1.json.tmp", pid=pid),
    ]
    unrelated = leave_behind(runtime_dir, "notes.json")
    assert read_status() == []
    assert not any(path.exists() for path in dead)
    assert unrelated.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_got_the_pid_of_a_dead_one_is_not_taken_for_it(runtime_dir: Path) -> None:
    stale = leave_behind(runtime_dir, f"{os.getpid()}-1.json", process_start=1)
    assert read_status() == []
    assert not stale.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_what_is_no_record_is_skipped(runtime_dir: Path, text: str) -> None:
    leave_behind(runtime_dir, f"{os.getpid()}-1.json").write_text(text)
    assert read_status() == []


def test_where_the_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert status_dir() == tmp_path / "lora-cache"
    monkeypatch.delenv("LORA_CACHE_STATUS_DIR")
    assert status_dir() == Path("/run/user/1/lora-cache")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert status_dir() == Path("~/.cache/lora-cache").expanduser()
