"""Packed images on disk: what comes back is what was packed, or nothing does."""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cache.engines.resident import image_file, image_store
from lora_cache.engines.resident.hands import Hands
from lora_cache.engines.resident.image_file import DamagedImageError, ImageFile
from lora_cache.engines.resident.image_store import ImageStore
from lora_cache.engines.resident.layout import Contents

LAYOUT, KEY = "1a" * 16, "sha256:5e"
CONTENTS = Contents(8, b"\x0f")
CHUNK = 512


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "home" / "images", 1 << 30)


def image(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def keep(store: ImageStore, data: bytes, key: str = KEY, layout: str = LAYOUT) -> bool:
    return store.write(layout, key, CONTENTS, memoryview(data))


def read(store: ImageStore, key: str = KEY, layout: str = LAYOUT) -> bytes | None:
    """What the store gives for a key; as the packer does, it throws away what is damaged."""
    found = store.find(layout, key)
    if found is None:
        return None
    assert found.contents == CONTENTS
    out = memoryview(bytearray(found.nbytes))
    try:
        found.fill(out, Hands(2))
    except DamagedImageError as error:
        store.discard(found.path, error)
        return None
    finally:
        found.close()
    return bytes(out)


def files(store: ImageStore) -> list[Path]:
    return sorted(store.directory.iterdir())


# ---------------------------------------------------------------------------- there and back


@given(st.integers(0, 5 * CHUNK), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_what_was_kept_comes_back(nbytes: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        store, data = ImageStore(Path(home) / "images", 1 << 30), image(nbytes, seed)
        assert read(store) is None
        assert keep(store, data)
        assert read(store) == data
        assert len(files(store)) == 1
        assert not store.damaged


def test_every_layout_and_every_adapter_has_its_own(store: ImageStore) -> None:
    names = [(layout, key) for layout in ("aa", "bb") for key in ("sha256:1", "hub:x@1")]
    for number, (layout, key) in enumerate(names):
        assert keep(store, image(1000, number), key, layout)
    for number, (layout, key) in enumerate(names):
        assert read(store, key, layout) == image(1000, number)
    assert read(store, "sha256:2", "aa") is None
    assert read(store, "sha256:1", "cc") is None


def test_the_directory_is_its_owner_s_alone(store: ImageStore) -> None:
    keep(store, image(10))
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(store)] == [0o600]


def test_what_was_removed_meanwhile_can_be_read_to_its_end(store: ImageStore) -> None:
    data = image(3000)
    keep(store, data)
    found = store.find(LAYOUT, KEY)
    assert found is not None
    files(store)[0].unlink()
    out = memoryview(bytearray(found.nbytes))
    found.fill(out)
    found.close()
    assert out == data


# ---------------------------------------------------------------------------- damage


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_never_served_and_is_replaced(choice: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as home:
        store, data = ImageStore(Path(home) / "images", 1 << 30), image(3 * CHUNK + 100)
        keep(store, data)
        (path,) = files(store)
        raw = bytearray(path.read_bytes())
        kind = choice.draw(st.sampled_from(["cut", "flipped", "longer", "zeroed"]))
        at = choice.draw(st.integers(0, len(raw) - 1))
        if kind == "cut":
            del raw[at:]
        elif kind == "flipped":
            raw[at] ^= 1 << choice.draw(st.integers(0, 7))
        elif kind == "longer":
            raw[at:at] = choice.draw(st.binary(min_size=1, max_size=CHUNK))
        else:
            raw[at:] = bytes(len(raw) - at)  # what a crash leaves of a file that was not synced
        same = raw == path.read_bytes()
        path.write_bytes(raw)
        assert read(store) == (data if same else None)
        if not same:
            assert store.damaged == 1
            assert files(store) == []
            assert keep(store, data)
        assert read(store) == data


def test_files_that_changed_places_are_noticed(store: ImageStore) -> None:
    keep(store, image(1000, 1), "sha256:1")
    keep(store, image(1000, 2), "sha256:2")
    one, two = files(store)
    one.rename(store.directory / "x")
    two.rename(one)
    (store.directory / "x").rename(two)
    assert read(store, "sha256:1") is None
    assert read(store, "sha256:2") is None
    assert store.damaged == 2
    assert files(store) == []


def test_another_format_s_file_is_none(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "FORMAT", 99)
    keep(store, image(1000))
    monkeypatch.undo()
    assert read(store) is None


@pytest.mark.parametrize("content", [b"", b"x", b"lora-img" * 40])
def test_anybody_s_file_under_the_name_is_none(store: ImageStore, content: bytes) -> None:
    keep(store, image(1000))
    files(store)[0].write_bytes(content)
    assert read(store) is None
    assert store.damaged == 1


def test_a_link_is_not_followed(store: ImageStore, tmp_path: Path) -> None:
    keep(store, image(1000))
    (path,) = files(store)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert read(store) is None


# ---------------------------------------------------------------------------- where it cannot be


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_can_enter_is_not_used(
    store: ImageStore, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    keep(store, image(1000))
    store.directory.chmod(mode)
    for _ in range(3):
        assert read(store) is None
        assert not keep(store, image(1000), "sha256:other")
    assert [record.message for record in caplog.records] == [
        f"{store.directory} is not used: it must be yours alone (mode 0700)"
    ]
    store.directory.chmod(0o700)
    assert read(store) == image(1000), "nothing was touched"


def test_another_user_s_directory_is_not_used(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(store, image(1000))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert read(store) is None
    assert not keep(store, image(1000), "sha256:other")


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("mine")
    store = ImageStore(tmp_path / "images", 1 << 30)
    assert read(store) is None
    assert not keep(store, image(1000))
    assert (tmp_path / "images").read_text() == "mine"


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From the `count`th write of a chunk on the disk is full."""
    real = os.pwrite

    def fill(count: int) -> None:
        left = [count]

        def pwrite(*args: Any) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        monkeypatch.setattr(os, "pwrite", pwrite)

    return fill


@pytest.mark.parametrize("after", [0, 1, 6])
def test_a_full_disk_is_no_error_and_leaves_nothing(
    store: ImageStore,
    full: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    keep(store, image(1000), "sha256:before")
    full(after)
    for _ in range(3):
        assert not keep(store, image(6 * CHUNK))
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert len(files(store)) == 1
    assert read(store, "sha256:before") == image(1000)
    monkeypatch.undo()
    assert not keep(store, image(1000)), "it waits before it tries again"
    store._writes_after = 0.0
    assert keep(store, image(1000))


def test_a_limit_on_files_is_no_error(store: ImageStore) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert not keep(store, image(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(store) == []


def test_short_writes_and_reads_are_completed(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, out, at: preadv(fd, [out[0][:7]], at))
    assert keep(store, image(1234))
    assert read(store) == image(1234)


# ---------------------------------------------------------------------------- budget


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", 10_000)
    for number in range(4):
        assert keep(store, image(2000), f"sha256:{number}")
        age(store._path(LAYOUT, f"sha256:{number}"), 100 - number)
    assert read(store, "sha256:0") is not None, "and by that it is the most recently used"
    for number in (4, 5):
        assert keep(store, image(2000), f"sha256:{number}")
    assert read(store, "sha256:1") is None
    assert read(store, "sha256:0") is not None
    assert read(store, "sha256:5") is not None
    assert store.evicted >= 1
    assert sum(path.stat().st_size for path in files(store)) <= 10_000


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 4000)), max_size=80))
@settings(max_examples=40, deadline=None)
def test_the_budget_is_kept(writes: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as home:
        store = ImageStore(Path(home) / "images", 10_000)
        for number, nbytes in writes:
            key = f"sha256:{number}-{nbytes}"
            if keep(store, image(nbytes), key):
                assert read(store, key) == image(nbytes)
            assert sum(path.stat().st_size for path in files(store)) <= 10_000


def test_what_could_never_fit_is_not_tried(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", 1000)
    assert not keep(store, image(1000))
    assert not store.directory.exists()


def test_others_files_are_left_alone(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", 5000)
    keep(store, image(1000), "sha256:1")
    other = store.directory / "notes.image"
    other.write_bytes(bytes(5000))
    for number in range(2, 6):
        keep(store, image(1000), f"sha256:{number}")
    assert other.exists()


def test_images_of_other_processes_count_before_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_store, "_COUNT_EVERY", 3)
    one, two = (ImageStore(tmp_path / "images", 20_000) for _ in range(2))
    for number in range(30):
        keep(one, image(1000), f"sha256:one {number}")
        keep(two, image(1000), f"sha256:two {number}")
    assert sum(path.stat().st_size for path in files(one)) <= 20_000 + 2 * 3 * 1200


def test_remains_of_a_killed_writer_are_written_over_or_make_room(tmp_path: Path) -> None:
    keep(ImageStore(tmp_path / "images", 10_000), image(100), "sha256:first")
    store = ImageStore(tmp_path / "images", 10_000)
    for key in (KEY, "sha256:never again"):
        part = store._path(LAYOUT, key).with_suffix(".part")
        part.write_bytes(bytes(4000))
        age(part, 1000)
    assert keep(store, image(2000))
    assert read(store) == image(2000)
    for number in range(3):
        assert keep(store, image(2000), f"sha256:{number}")
    assert all(path.suffix == ".image" for path in files(store))


def test_what_is_being_written_does_not_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes room while this one is in the middle of a file."""
    one, two = (ImageStore(tmp_path / "images", 7000) for _ in range(2))
    real, inside = image_file.write_image, [True]

    def write_image(fd: int, *args: Any) -> None:
        real(fd, *args)
        if inside[0]:
            inside[0] = False
            for number in range(4):
                assert keep(two, image(2000), f"sha256:{number}")
            assert not keep(two, image(2000)), "somebody writes it"

    monkeypatch.setattr(image_store, "write_image", write_image)
    assert keep(one, image(2000))
    assert read(one) == image(2000)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("few_descriptors")
def test_no_descriptor_is_left_open(store: ImageStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    keep(store, image(1000))
    read(store)
    raw = files(store)[0].read_bytes()
    for damaged in (b"", raw[:-1], raw[1:], bytes(len(raw)), b"\xff" + raw[1:]):
        store._path(LAYOUT, KEY).write_bytes(damaged)
        read(store)
    with pytest.raises(FileNotFoundError):
        ImageFile(store.directory / "nothing")
