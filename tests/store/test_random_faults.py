"""Any sequence of faults: the whole, right adapter, or an error of ours; never a broken one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lora_cache.adapter import Adapter
from lora_cache.errors import LoraCacheError
from lora_cache.sources import http
from tests.hub.faults import (
    BROKEN,
    ENTRY_NOT_FOUND,
    FORBIDDEN,
    UNAVAILABLE,
    BodyFault,
    Call,
    Cut,
    Drop,
    Fault,
    Flip,
    Short,
    Stall,
    WrongLength,
    too_many_requests,
)
from tests.hub.files import adapter_files
from tests.hub.fixtures import Hub
from tests.store.clients import CONFIG, LIST, RESOLVE, WEIGHTS, Client

ROUNDS = 8


def faults(rng: random.Random, hub: Hub) -> None:
    """Up to six of them, one after the other or at once."""
    for _ in range(rng.randint(1, 6)):
        answers: list[Fault] = [
            BROKEN,
            UNAVAILABLE,
            too_many_requests(0),
            Drop(),
            Drop(reset=True),
            Call(lambda: push(rng, hub)),
        ]
        if rng.random() < 0.1:
            answers += [FORBIDDEN, ENTRY_NOT_FOUND]
        bodies: list[BodyFault] = [
            Cut(rng.uniform(0, 10), reset=rng.random() < 0.5),
            Short(rng.uniform(0, 10)),
            Flip(rng.uniform(0, 9), count=rng.randint(1, 1000)),
            WrongLength(rng.randint(-500, 500)),
            Stall(rng.randint(0, 10_000)),
        ]
        times, skip = rng.choice([1, 1, 2, None]), rng.randint(0, 3)
        if rng.random() < 0.4:
            place = rng.choice([RESOLVE, LIST, CONFIG, WEIGHTS])
            hub.proxy.on(rng.choice(answers), place, times=times, skip=skip)
        else:
            place = rng.choice([CONFIG, WEIGHTS])
            hub.proxy.on(rng.choice(bodies), place, times=times, skip=skip)


def push(rng: random.Random, hub: Hub) -> None:
    hub.repos.commit(hub.name("sql"), contents(rng.randrange(1000)))


def contents(seed: int) -> dict[str, bytes]:
    return adapter_files(random.Random(seed).choice([4_000, 20_000]), seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_never_a_broken_adapter(
    hub: Hub, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SILENT_S", 0.0)
    rng = random.Random(seed)
    hub.repos.create(hub.name("sql"), contents(rng.randrange(1000)))
    client = Client(hub, tmp_path, timeout_s=0.25)
    outcomes: set[str] = set()
    for _ in range(ROUNDS):
        hub.proxy.like_the_hub(rng.random() < 0.7)
        faults(rng, hub)
        try:
            check(hub, client.get(hub.name("sql")))
            outcomes.add("it came")
        except LoraCacheError as error:
            outcomes.add(type(error).__name__)
        hub.proxy.off()
        everything_published_is_whole(hub, client)
        # What went wrong is over: it works, with what is left there.
        client.options.pop("timeout_s", None)
        client.forget()
        found = client.get(hub.name("sql"))
        assert found.key.digest.endswith(hub.repos.revision(hub.name("sql")))
        check(hub, found)
        if rng.random() < 0.5:
            push(rng, hub)
            client.options["timeout_s"] = 0.25
            client.forget()
        else:
            client = Client(hub, tmp_path, timeout_s=0.25)
    assert len(outcomes) > 1


def check(hub: Hub, adapter: Adapter) -> None:
    whole(hub, adapter.path, adapter.key.digest.rpartition("@")[2])


def everything_published_is_whole(hub: Hub, client: Client) -> None:
    for path in client.store.glob("adapters/*"):
        text = (path / "origin.json").read_text()
        commit = text.partition(f"{hub.name('sql')}@")[2][:40]
        whole(hub, path, commit)


def whole(hub: Hub, path: Path, commit: str) -> None:
    """The bytes are those of the commit, by git's own account."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (path / name).read_bytes() == hub.repos.content(hub.name("sql"), commit, name)
