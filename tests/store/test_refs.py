"""What refs of the Hub mean: branches move, commits do not, and the Hub may be out of reach."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

import pytest

from lora_cache import AsyncLoraCache
from lora_cache.errors import InvalidAdapterError, SourceError
from lora_cache.sources import HubSource
from lora_cache.testing import FakeEngine
from tests.hub.faults import BROKEN, Drop
from tests.hub.files import adapter_files, clutter
from tests.hub.fixtures import Hub
from tests.hub.parts import Repo
from tests.store.clients import RESOLVE, WEIGHTS, Client, create

OFFLINE = "huggingface_hub.constants.HF_HUB_OFFLINE"


def test_all_names_of_a_commit_share_one_copy(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    name = hub.name("sql")
    commit = hub.repos.revision(name)
    hub.repos.tag(name, "v1")
    hub.repos.tag(name, "v2", annotated=True)
    hub.repos.branch(name, "stable")
    client = Client(hub, tmp_path)
    refs = [name, *(f"{name}@{r}" for r in ("main", "v1", "v2", "stable", commit, commit[:10]))]
    adapters = [client.get(ref) for ref in refs]
    assert len({adapter.path for adapter in adapters}) == 1
    assert {adapter.key.digest for adapter in adapters} == {f"hub:{name}@{commit}"}
    assert len(hub.proxy.seen(WEIGHTS)) == 1
    client.check(adapters[0], files)


def test_a_branch_with_a_slash(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    hub.repos.branch(hub.name("sql"), "feat/x")
    hub.proxy.like_the_hub()
    client = Client(hub, tmp_path)
    client.check(client.get(f"{hub.name('sql')}@feat/x"), files)


def test_only_what_vllm_reads_is_requested(hub: Hub, tmp_path: Path) -> None:
    files = adapter_files(8_000)
    hub.repos.create(hub.name("sql"), files | clutter())
    for real in (False, True):
        hub.proxy.like_the_hub(real)
        hub.proxy.forget()
        client = Client(hub, tmp_path)
        client.check(client.get(hub.name("sql")), files)
        fetched = {seen.target.partition("?")[0].rpartition("/")[2] for seen in hub.proxy.requests}
        assert {name for name in fetched if "." in name} == set(files)


def test_a_commit_that_is_here_needs_no_request(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    ref = f"{hub.name('sql')}@{hub.repos.revision(hub.name('sql'))}"
    client = Client(hub, tmp_path)
    client.get(ref)
    assert not hub.proxy.seen(RESOLVE)
    hub.proxy.forget()
    client.forget()
    client.check(client.get(ref), files)
    assert not hub.proxy.requests


def test_a_branch_is_believed_for_as_long_as_it_is_said(hub: Hub, tmp_path: Path) -> None:
    create(hub)
    client = Client(hub, tmp_path, ttl_s=0.5)
    old = client.get(hub.name("sql"))
    started = time.monotonic()
    new = hub.repos.commit(hub.name("sql"), adapter_files(8_000, seed=9))
    asked = 0
    while client.get(hub.name("sql")).key == old.key and time.monotonic() < started + 10:
        asked = len(hub.proxy.seen(RESOLVE))
    assert asked == 1
    assert time.monotonic() - started >= 0.4
    assert client.get(hub.name("sql")).key.digest.endswith(new)
    assert len(hub.proxy.seen(RESOLVE)) == 2


def test_an_update_never_changes_what_a_lease_or_a_pin_has(hub: Hub, tmp_path: Path) -> None:
    async def main() -> None:
        files = create(hub)
        name = hub.name("sql")
        source = HubSource(endpoint=hub.endpoint, cache_dir=hub.cache_dir, ttl_s=0.1)
        cache = AsyncLoraCache(
            FakeEngine(), sources={"hub": source}, disk_dir=tmp_path / "store", publish=False
        )
        async with cache:
            await cache.pin(name, tier="host")
            async with cache.lease(name) as old:
                hub.repos.commit(name, adapter_files(40_000, seed=9))
                await asyncio.sleep(0.15)
                async with cache.lease(name) as new:
                    assert new.key != old.key
                    assert new.adapter.path != old.adapter.path
                for file, content in files.items():
                    assert (old.adapter.path / file).read_bytes() == content
            pinned = [entry.key for entry in cache.snapshot().adapters if entry.pinned]
            assert pinned == [old.key.digest]

    asyncio.run(main())


# ---------------------------------------------------------------------- out of reach


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    match how:
        case "said so":
            monkeypatch.setattr(OFFLINE, True)
        case "stopped":
            hub.proxy.stop()
        case "dropped":
            hub.proxy.on(Drop(), times=None)
        case "broken":
            hub.proxy.on(BROKEN, times=None)


HOW = pytest.mark.parametrize("how", ["said so", "stopped", "dropped", "broken"])


@HOW
@pytest.mark.parametrize("restarted", [False, True])
def test_the_last_commit_serves_while_the_hub_does_not(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
    restarted: bool,
) -> None:
    files = create(hub)
    client = Client(hub, tmp_path, ttl_s=0.01)
    before = client.get(hub.name("sql"))
    if restarted:
        client.forget()
    hub.repos.commit(hub.name("sql"), adapter_files(8_000, seed=9))
    offline(hub, monkeypatch, how)
    time.sleep(0.02)
    with caplog.at_level(logging.WARNING, "lora_cache"):
        now = client.get(hub.name("sql"))
    assert now.key == before.key
    client.check(now, files)
    (warning,) = caplog.records
    assert hub.name("sql") in warning.getMessage()
    assert before.key.digest[-40:][:12] in warning.getMessage()
    if how == "said so":
        monkeypatch.setattr(OFFLINE, False)
        client.forget()
        assert client.get(hub.name("sql")).key != before.key


@HOW
def test_what_was_never_here_is_an_error_that_says_why(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    create(hub)
    commit = hub.repos.revision(hub.name("sql"))
    offline(hub, monkeypatch, how)
    client = Client(hub, tmp_path)
    for ref in (hub.name("sql"), f"{hub.name('sql')}@{commit}"):
        error = client.error(ref)
        assert type(error) is SourceError
        assert hub.name("sql") in str(error)
        assert ("HF_HUB_OFFLINE" in str(error)) is (how == "said so")
    if how == "said so":
        assert not hub.proxy.requests


def test_it_serves_no_longer_than_need_be(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was believed for want of an answer is not believed for as long as an answer."""
    monkeypatch.setattr("lora_cache.sources.hub._STALE_S", 0.2)
    monkeypatch.setattr("lora_cache.sources.http._SILENT_S", 0.0)
    repo = Repo(hub)
    path = repo.snapshot()
    rule = hub.proxy.on(Drop(), times=None)
    client = Client(hub, tmp_path, ttl_s=1000)
    assert client.get(repo.name).path == path
    hub.proxy.off(rule)
    new = hub.repos.commit(repo.name, adapter_files(8_000, seed=9))
    asked = len(hub.proxy.requests)
    assert client.get(repo.name).path == path
    assert len(hub.proxy.requests) == asked
    time.sleep(0.25)
    assert client.get(repo.name).key.digest.endswith(new)


def test_a_new_commit_that_cannot_be_fetched_leaves_the_old_one_serving(
    hub: Hub, tmp_path: Path
) -> None:
    files = create(hub)
    client = Client(hub, tmp_path)
    old = client.get(hub.name("sql"))
    hub.repos.commit(hub.name("sql"), adapter_files(8_000, seed=9))
    hub.proxy.on(BROKEN, WEIGHTS, times=None)
    client.forget()
    now = client.get(hub.name("sql"))
    assert now.key == old.key
    assert (now.path / "adapter_model.safetensors").read_bytes() == files[
        "adapter_model.safetensors"
    ]


# ---------------------------------------------------------------------- the user's own cache


def test_what_the_user_has_is_used_in_place(hub: Hub, tmp_path: Path) -> None:
    repo = Repo(hub)
    path = repo.snapshot()
    hub.proxy.forget()
    client = Client(hub, tmp_path)
    assert client.get(f"{repo.name}@{repo.commit}").path == path
    assert not hub.proxy.requests
    assert client.get(repo.name).path == path
    assert [seen.target for seen in hub.proxy.requests] == [
        f"/api/models/{repo.name}/revision/main"
    ]
    assert not list(client.store.glob("adapters/*"))


def test_half_of_it_is_not_enough(hub: Hub, tmp_path: Path) -> None:
    repo = Repo(hub)
    (repo.snapshot() / "adapter_config.json").unlink()
    client = Client(hub, tmp_path)
    client.check(client.get(repo.name), repo.files)


def test_offline_it_serves_what_the_user_has(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    repo = Repo(hub)
    path = repo.snapshot()
    monkeypatch.setattr(OFFLINE, True)
    assert Client(hub, tmp_path).get(repo.name).path == path
    assert repo.commit[:12] in caplog.text


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_out_of_the_repository_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    repo = Repo(hub)
    path = repo.snapshot()
    outside = tmp_path / "outside"
    outside.write_bytes(repo.files[name])
    (path / name).unlink()
    os.symlink(outside, path / name)
    error = Client(hub, tmp_path).error(repo.name)
    assert type(error) is InvalidAdapterError
    assert "leads out" in str(error)
