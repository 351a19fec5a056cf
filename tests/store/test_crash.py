"""kill -9 at any moment of a pull: what is there is whole, what was whole is not fetched again."""

from __future__ import annotations

import os
import random
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from lora_cache.store import Store
from tests.hub.faults import Answer, Delay, Slow
from tests.hub.files import WEIGHTS, adapter_files
from tests.hub.fixtures import Hub
from tests.store.parts import check_agreement, check_idle, content_of
from tests.store.puller import POINTS, finish, pull_from

NAMES = ["a", "b", "c", "d", "e"]
KILLS = int(os.environ.get("LORA_CACHE_KILLS", "50"))
SEED = int(os.environ.get("LORA_CACHE_SEED", "1"))


class Trickle(Slow):
    """Slow to the client only: olah gets stuck when it is cut off again and again."""

    def spoil(self, answer: Answer, closing: threading.Event) -> None:
        answer.body = iter([b"".join(answer.body)])
        super().spoil(answer, closing)


class Pulls:
    """Pulls of the same adapters, again and again, into one store."""

    def __init__(self, hub: Hub, root: Path) -> None:
        self.hub, self.root, self.names = hub, root, NAMES
        self.files = {name: adapter_files(100_000, seed=n) for n, name in enumerate(NAMES)}
        for name, files in self.files.items():
            hub.repos.create(hub.name(name), files)

    def whole(self) -> set[str]:
        """The adapters whose weights are here, published or not."""
        found = set()
        for place in ("adapters", "partial"):
            for path in (self.root / place).glob(f"*/{WEIGHTS}"):
                name = path.parent.name.rpartition("-")[0]
                if path.stat().st_size == len(self.files[name][WEIGHTS]):
                    found.add(name)
        return found

    def begun(self) -> set[str]:
        """The adapters of whose weights something is here."""
        found = (self.root / "partial").glob(f"*/{WEIGHTS}")
        return {path.parent.name.rpartition("-")[0] for path in found if path.stat().st_size}

    def check(self, whole: set[str], begun: set[str]) -> None:
        """After a pull that may have died: `whole` was not fetched again, `begun` went on."""
        deadline = time.monotonic() + 2  # for what the dead one had asked for
        while any(seen.status is None for seen in self.hub.proxy.requests):
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        for path in (self.root / "adapters").glob("*"):
            assert content_of(path) == self.files[path.name.rpartition("-")[0]]
        asked = self.hub.proxy.requests
        while asked and "/revision/" not in asked[0].target:
            del asked[0]  # of the process that died before: this one first asks what refs mean
        for name in NAMES:
            wanted = re.compile(f"/{name}/resolve/.*{WEIGHTS}")
            gets = [seen for seen in asked if wanted.search(seen.target)]
            assert not gets or name not in whole, gets
            assert len(gets) <= 1, gets
            if gets and name in begun:
                assert gets[0].range is not None, gets

    def finish(self) -> None:
        """A pull that is left alone puts everything right."""
        whole, begun = self.whole(), self.begun()
        self.hub.proxy.forget()
        finish(pull_from(self.hub, self.root, self.names))
        self.check(whole, begun)
        assert self.whole() == set(self.names)
        check_idle(self.root)


@pytest.fixture
def pulls(hub: Hub, tmp_path: Path) -> Pulls:
    return Pulls(hub, tmp_path / "store")


@pytest.mark.long
def test_killed_at_any_moment(pulls: Pulls) -> None:
    rng = random.Random(SEED)
    pulls.hub.proxy.on(Trickle(1_000_000), WEIGHTS, times=None)
    pulls.hub.proxy.on(Delay(0.02), "/api/", times=None)
    kills = 0
    while kills < KILLS:
        whole, begun = pulls.whole(), pulls.begun()
        pulls.hub.proxy.forget()
        process = pull_from(pulls.hub, pulls.root, NAMES)
        pulls.hub.proxy.wait_for("")  # it has begun
        process.join(rng.uniform(0, 0.5))
        if process.exitcode is None:
            kills += 1
            process.kill()
            process.join()
        assert process.exitcode in (0, -9)
        pulls.check(whole, begun)
        if process.exitcode == 0:
            check_idle(pulls.root)
            shutil.rmtree(pulls.root)
    pulls.finish()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.long
def test_killed_where_it_matters(pulls: Pulls, after: bool) -> None:
    pulls.names = NAMES[:3]
    for number, point in enumerate(POINTS):
        whole, begun = pulls.whole(), pulls.begun()
        pulls.hub.proxy.forget()
        process = pull_from(pulls.hub, pulls.root, pulls.names, {}, (point, 1 + number % 3, after))
        process.join(30)
        assert process.exitcode in (0, -9)
        pulls.check(whole, begun)
        if pulls.root.exists():
            check_agreement(pulls.root)
        pulls.finish()
        shutil.rmtree(pulls.root)


def test_nobody_waits_for_the_dead(pulls: Pulls) -> None:
    rule = pulls.hub.proxy.on(Trickle(100_000), WEIGHTS, times=None)
    first = pull_from(pulls.hub, pulls.root, NAMES[:1])
    deadline = time.monotonic() + 10
    while not pulls.begun():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pulls.hub.proxy.off(rule)
    second = pull_from(pulls.hub, pulls.root, NAMES[:1])
    second.join(0.3)
    assert second.exitcode is None  # it waits
    pulls.hub.proxy.forget()
    first.kill()
    began = time.monotonic()
    finish(second)
    assert time.monotonic() - began < 1
    (get,) = pulls.hub.proxy.seen(WEIGHTS, "GET")
    assert get.range is not None  # it went on where the other was killed
    pulls.check(set(), set())
    check_idle(pulls.root)


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    root = tmp_path / "store"
    left = root / "trash" / "0123"
    left.mkdir(parents=True)
    (left / "file").write_text("x")
    store = Store(root)
    (root / "adapters").mkdir()
    assert store.entries() == []
    assert not left.exists()
