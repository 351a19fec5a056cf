"""Local directories: identity by content, and how little is read to know it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cache.adapter import Adapter, AdapterRef
from lora_cache.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterNotFoundError,
    InvalidAdapterError,
)
from lora_cache.manifest import CONFIG_FILE, FILES, WEIGHTS_FILE, read_manifest
from lora_cache.sources import LocalSource
from lora_cache.sources.content import content_digest
from tests.real.parts import write_adapter

not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def resolve(path: Path, source: LocalSource | None = None) -> Adapter:
    return (source or LocalSource()).resolve(AdapterRef.local(path))


class Reads:
    """Counts the files that are digested; `then` is called after each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.then: Callable[[int], object] = lambda count: None
        monkeypatch.setattr("lora_cache.sources.local.content_digest", self._read)

    def _read(self, *args: Any) -> Any:
        digest = content_digest(*args)
        self.count += 1
        self.then(self.count)
        return digest


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the wall clock run ahead.  Times of files cannot be set back: ctime is the kernel's."""
    real, ahead = time.time_ns, [0.0]
    monkeypatch.setattr(time, "time_ns", lambda: real() + int(ahead[0] * 1e9))
    return lambda seconds: ahead.__setitem__(0, ahead[0] + seconds)


# ---------------------------------------------------------------------------- identity


def test_the_same_content_in_two_directories_is_one_adapter(tmp_path: Path) -> None:
    one = resolve(write_adapter(tmp_path / "one", seed=1))
    two = resolve(write_adapter(tmp_path / "two", seed=1))
    assert one.key == two.key
    assert (one.key.name, two.key.name) == ("one", "two")
    assert (one.path, two.path) == (tmp_path.resolve() / "one", tmp_path.resolve() / "two")


def test_other_files_in_the_directory_are_not_part_of_it(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    before = resolve(directory).key
    (directory / "README.md").write_text("a model card")
    assert resolve(directory).key == before


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"rank": 8}, {"config": {"lora_alpha": 5}}, {"config": {"note": "x"}}],
    ids=["weights", "rank", "alpha", "a setting that is not read"],
)
def test_changed_content_is_another_adapter(tmp_path: Path, change: dict[str, Any]) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a", seed=1)
    before = resolve(directory, source)
    write_adapter(directory, **{"seed": 1, **change})
    after = resolve(directory, source)
    assert after.key != before.key
    assert after.manifest == read_manifest(directory)


def test_content_that_comes_back_is_the_first_adapter_again(tmp_path: Path) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a", seed=1)
    first = resolve(directory, source)
    second = resolve(write_adapter(directory, seed=2), source)
    third = resolve(write_adapter(directory, seed=1), source)
    assert first.key == third.key != second.key


def test_the_digest_is_a_blake3_that_other_sources_agree_on(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    digest = resolve(directory).key.digest
    assert digest.startswith("blake3:")
    assert len(bytes.fromhex(digest.removeprefix("blake3:"))) == 32
    assert digest == resolve(directory).key.digest


# ---------------------------------------------------------------------------- paths


def test_a_link_to_a_directory_resolves_to_the_canonical_path(tmp_path: Path) -> None:
    real = write_adapter(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    source = LocalSource()
    through = resolve(tmp_path / "link", source)
    assert through.path == real.resolve()
    assert through.key == resolve(real, source).key
    assert through.key.name == "link", "people see the name that they gave"


def test_a_retargeted_link_resolves_to_the_new_directory(tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one", seed=1), write_adapter(tmp_path / "two", seed=2)
    link, source = tmp_path / "link", LocalSource()
    link.symlink_to(one)
    before = resolve(link, source)
    link.unlink()
    link.symlink_to(two)
    after = resolve(link, source)
    assert after.key != before.key
    assert after.path == two.resolve()


def test_linked_files_are_those_that_they_point_to(tmp_path: Path) -> None:
    real = write_adapter(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for name in FILES:
        (tmp_path / "linked" / name).symlink_to(real / name)
    source = LocalSource()
    linked = resolve(tmp_path / "linked", source)
    assert linked.key == resolve(real, source).key
    write_adapter(real, seed=5)
    assert not linked.is_unchanged()


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="save_pretrained"):
        resolve(tmp_path / "none")


def test_links_that_go_in_circles_are_an_adapter_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(AdapterError, match=str(tmp_path)):
        resolve(tmp_path / "a")


@not_as_root
@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_invalid(tmp_path: Path, name: str) -> None:
    directory = write_adapter(tmp_path / "a")
    (directory / name).chmod(0)
    with pytest.raises(InvalidAdapterError, match=name):
        resolve(directory)


# ---------------------------------------------------------------------------- is it current?


def in_place(path: Path) -> None:
    """Other bytes of the same length, in the same inode, at the same mtime."""
    before = path.stat()
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another inode under the old name, with the old size and mtime."""
    before = path.stat()
    other = path.with_suffix(".new")
    shutil.copy2(path, other)
    other.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "touched": Path.touch,
    "written in place": in_place,
    "replaced": replaced,
    "longer": lambda path: path.open("ab").write(b" "),
    "set back": lambda path: os.utime(path, (0, 0)),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_is_current_until_a_file_is(tmp_path: Path, name: str, change: str) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a")
    ref, adapter = AdapterRef.local(directory), resolve(directory, source)
    assert source.is_current(ref, adapter)
    time.sleep(0.02)  # more than a tick of the kernel's clock
    CHANGES[change](directory / name)
    assert not source.is_current(ref, adapter)


def test_an_adapter_is_not_current_once_its_directory_is_gone(tmp_path: Path) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a")
    adapter = resolve(directory, source)
    shutil.rmtree(directory)
    assert not source.is_current(AdapterRef.local(directory), adapter)


def test_asking_whether_it_is_current_reads_nothing(tmp_path: Path, reads: Reads) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a")
    adapter = resolve(directory, source)
    before = reads.count
    for _ in range(3):
        assert source.is_current(AdapterRef.local(directory), adapter)
    assert reads.count == before


# ---------------------------------------------------------------------------- remembered digests


def test_files_that_have_settled_are_read_once(
    tmp_path: Path, reads: Reads, later: Callable[[float], None]
) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a")
    later(10)
    keys = {resolve(directory, source).key for _ in range(3)}
    assert len(keys) == 1
    assert reads.count == len(FILES)
    (tmp_path / "link").symlink_to(directory)
    assert resolve(tmp_path / "link", source).key in keys
    assert reads.count == len(FILES), "the same files by another name"


@pytest.mark.parametrize("mtime_too", [False, True])
def test_files_written_a_moment_ago_are_read_each_time(
    tmp_path: Path, reads: Reads, mtime_too: bool
) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a")
    if mtime_too:  # an old mtime proves nothing, as anyone can set it
        for name in FILES:
            os.utime(directory / name, (0, 0))
    resolve(directory, source)
    resolve(directory, source)
    assert reads.count == 2 * len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_one_young_file_is_enough_to_read_again(
    tmp_path: Path, reads: Reads, later: Callable[[float], None], name: str
) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a")
    later(10)
    first = resolve(directory, source)
    later(-10)
    time.sleep(0.02)
    in_place(directory / name) if name == WEIGHTS_FILE else (directory / name).touch()
    again = [resolve(directory, source) for _ in range(2)]
    assert reads.count == 3 * len(FILES)
    assert (again[0].key == first.key) == (name == CONFIG_FILE)


def test_a_touched_file_is_read_again_and_the_adapter_stays_the_same(
    tmp_path: Path, reads: Reads, later: Callable[[float], None]
) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a")
    later(10)
    before = resolve(directory, source)
    time.sleep(0.02)
    (directory / WEIGHTS_FILE).touch()
    after = resolve(directory, source)
    assert after.key == before.key
    assert after.stamp != before.stamp
    assert reads.count == 2 * len(FILES)


def test_a_bounded_number_of_digests_is_remembered(
    tmp_path: Path,
    reads: Reads,
    later: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_cache.sources.local._MAX_REMEMBERED", 2)
    source = LocalSource()
    directories = [write_adapter(tmp_path / str(i), seed=i) for i in range(3)]
    later(10)
    keys = [resolve(directory, source).key for directory in directories]
    assert reads.count == 3 * len(FILES)
    assert resolve(directories[2], source).key == keys[2]
    assert reads.count == 3 * len(FILES), "the latest is remembered"
    assert resolve(directories[0], source).key == keys[0]
    assert reads.count == 4 * len(FILES), "the others were forgotten"


# ---------------------------------------------------------------------------- while it is read


@pytest.mark.parametrize("after_file", [1, 2])
@pytest.mark.parametrize("name", FILES)
def test_files_rewritten_while_they_are_read_are_reported_as_changed(
    tmp_path: Path, reads: Reads, name: str, after_file: int
) -> None:
    source, directory = LocalSource(), write_adapter(tmp_path / "a", seed=1)
    time.sleep(0.02)
    reads.then = lambda count: in_place(directory / name) if count == after_file else None
    with pytest.raises(AdapterChangedError, match=r"written to while it was read: try again"):
        resolve(directory, source)
    reads.then = lambda count: None
    raw = (directory / name).read_bytes()  # the last byte of the config was its brace
    (directory / name).write_bytes(raw[:-1] + b"}" if name == CONFIG_FILE else raw)
    assert resolve(directory, source).key == resolve(directory).key, "nothing was remembered"


@pytest.mark.parametrize("after_file", [1, 2])
def test_files_removed_while_they_are_read_are_an_adapter_error(
    tmp_path: Path, reads: Reads, after_file: int
) -> None:
    directory = write_adapter(tmp_path / "a")
    reads.then = lambda count: shutil.rmtree(directory) if count == after_file else None
    with pytest.raises(AdapterError, match=str(directory)):
        resolve(directory)
