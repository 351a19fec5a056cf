"""Whom the source believes, how much it takes, and what becomes of a token."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path

import pytest

from lora_cache.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    InvalidAdapterError,
    LoraCacheError,
    SourceError,
    UnsupportedAdapterError,
)
from lora_cache.store import Progress
from tests.hub.faults import BROKEN, FORBIDDEN, UNAUTHORIZED, Cut, Drop, Fault
from tests.hub.files import CONFIG as CONFIG_FILE
from tests.hub.files import WEIGHTS as WEIGHTS_FILE
from tests.hub.files import adapter_files
from tests.hub.fixtures import Hub
from tests.store.clients import CONFIG, LIST, RESOLVE, WEIGHTS, Client, create

TOKEN = "hf_MostSecretTokenOfThemAll"


# ---------------------------------------------------------------------- who


def test_only_some_organisations(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    strict = Client(hub, tmp_path, orgs=["acme", "corp"])
    commit = hub.repos.revision(hub.name("sql"))
    for ref in (hub.name("sql"), f"{hub.name('sql')}@{commit}"):
        error = strict.error(ref)
        assert type(error) is AccessDeniedError
        assert "acme, corp" in str(error)
    assert not hub.proxy.requests
    assert "nobody" in str(Client(hub, tmp_path, orgs=[]).error(hub.name("sql")))
    client = Client(hub, tmp_path, orgs=[hub.org])
    client.check(client.get(hub.name("sql")), files)


def test_organisations_are_asked_for_what_is_here_too(hub: Hub, tmp_path: Path) -> None:
    create(hub)
    client = Client(hub, tmp_path)
    client.get(hub.name("sql"))
    client.options["orgs"] = ["acme"]
    client.forget()
    with pytest.raises(AccessDeniedError):
        client.get(hub.name("sql"))


@pytest.mark.parametrize("real", [False, True])
def test_private_and_gated_take_a_token_each(hub: Hub, tmp_path: Path, real: bool) -> None:
    hub.proxy.like_the_hub(real)
    one, two = create(hub, "one"), create(hub, "other")
    hub.proxy.private(hub.name("one"), "hf_one")
    hub.proxy.gated(hub.name("other"), "hf_two")

    nobody = Client(hub, tmp_path)
    assert type(nobody.error(hub.name("one"))) is AdapterNotFoundError
    assert type(nobody.error(hub.name("other"))) is AccessDeniedError
    first, second = (Client(hub, tmp_path, token=token) for token in ("hf_one", "hf_two"))
    first.check(first.get(hub.name("one")), one)
    second.check(second.get(hub.name("other")), two)
    first, second = (Client(hub, tmp_path, token=token) for token in ("hf_one", "hf_two"))
    error = first.error(hub.name("other"))
    assert type(error) is AccessDeniedError
    assert "gated" in str(error)
    assert type(second.error(hub.name("one"))) is AccessDeniedError


def test_the_users_own_token_is_the_default(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = create(hub)
    hub.proxy.private(hub.name("sql"), "hf_users")
    monkeypatch.setenv("HF_TOKEN", "hf_users")
    client = Client(hub, tmp_path, token=None)
    client.check(client.get(hub.name("sql")), files)
    assert type(Client(hub, tmp_path, token=False).error(hub.name("sql"))) is AdapterNotFoundError


def test_a_token_that_must_be_there_and_is_not(hub: Hub, tmp_path: Path) -> None:
    create(hub)
    error = Client(hub, tmp_path, token=True).error(hub.name("sql"))
    assert type(error) is AccessDeniedError
    assert "HF_TOKEN" in str(error)


# ---------------------------------------------------------------------- the token


def test_a_token_is_never_told(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not by logs, errors and their causes, progress, or any file of the store."""
    caplog.set_level(logging.DEBUG, "lora_cache")
    create(hub)
    hub.proxy.like_the_hub()
    faults: list[Fault] = [UNAUTHORIZED, FORBIDDEN, BROKEN, Drop()]
    told: list[str] = []
    for place in (RESOLVE, LIST, CONFIG, WEIGHTS):
        for fault in faults:
            client = Client(hub, tmp_path, token=TOKEN)
            rule = hub.proxy.on(fault, place, times=None)
            with pytest.raises(LoraCacheError) as raised:
                client.get(hub.name("sql"))
            hub.proxy.off(rule)
            told += texts_of(raised.value)
    client = Client(hub, tmp_path, token=TOKEN)
    hub.proxy.on(Cut(5), WEIGHTS)
    seen: list[Progress] = []
    client.get(hub.name("sql"), seen.append)
    told += [repr(client.source), str(client.source), repr(seen), caplog.text]
    assert caplog.text
    assert seen
    text = "\n".join(told)
    for secret in (TOKEN, "Signature"):
        assert secret not in text
    for path in client.files():
        assert TOKEN.encode() not in path.read_bytes()
        assert b"Signature" not in path.read_bytes()


def texts_of(error: BaseException) -> list[str]:
    told = ["".join(traceback.format_exception(error))]
    inner: BaseException | None = error
    while inner is not None:
        told += [str(inner), repr(inner)]
        inner = inner.__cause__
    return told


# ---------------------------------------------------------------------- how much, and of what


def test_too_large_by_the_listing(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    total = sum(map(len, files.values()))
    error = Client(hub, tmp_path, max_bytes=total - 1).error(hub.name("sql"))
    assert type(error) is UnsupportedAdapterError
    assert "max_bytes" in str(error)
    assert not hub.proxy.seen(f"{CONFIG}|{WEIGHTS}", "GET")
    client = Client(hub, tmp_path, max_bytes=total)
    client.check(client.get(hub.name("sql")), files)


def test_more_than_was_promised_does_not_reach_the_disk(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cache.sources import hub as module

    small, large = adapter_files(10_000), adapter_files(2_000_000)
    name = hub.name("sql")
    hub.repos.create(name, small)
    old = hub.repos.revision(name)
    new = hub.repos.commit(name, large)
    client = Client(hub, tmp_path)
    most = 0

    class Watching(module.HubSource):
        """Lists one commit, and sends another."""

        def open(self, remote, file, offset):  # type: ignore[no-untyped-def]
            nonlocal most
            remote = type(remote)(remote.key, remote.ref, f"{name}@{new}")
            body = super().open(remote, file, offset)

            class Watched:
                def __init__(self) -> None:
                    self.offset = body.offset

                def __iter__(self):  # type: ignore[no-untyped-def]
                    nonlocal most
                    for piece in body:
                        yield piece
                        sizes = [path.stat().st_size for path in client.store.glob("partial/*/*")]
                        most = max([most, *sizes])

                def close(self) -> None:
                    body.close()

            return Watched()

    client.source = Watching(endpoint=hub.endpoint, cache_dir=hub.cache_dir, token=False)
    error = client.error(f"{name}@{old}")
    assert type(error) is InvalidAdapterError
    assert 0 < most <= max(map(len, small.values()))
    assert len(hub.proxy.seen(WEIGHTS)) <= 2


CONFIGS = [
    ({"use_dora": True}, UnsupportedAdapterError, "DoRA"),
    ({"peft_type": "IA3"}, UnsupportedAdapterError, "IA3"),
    ({"r": -1}, InvalidAdapterError, "r"),
    ({"bias": "all"}, UnsupportedAdapterError, "bias"),
]


@pytest.mark.parametrize(("config", "kind", "words"), CONFIGS)
def test_a_bad_configuration_is_refused_alone(
    hub: Hub, tmp_path: Path, config: dict[str, object], kind: type[LoraCacheError], words: str
) -> None:
    hub.repos.create(hub.name("sql"), adapter_files(10_000, config=config))
    client = Client(hub, tmp_path)
    error = client.error(hub.name("sql"))
    assert type(error) is kind
    assert words in str(error)
    assert hub.name("sql") in str(error)
    assert not hub.proxy.seen(WEIGHTS)
    assert not list(client.store.glob("partial/*"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_configuration(hub: Hub, tmp_path: Path, content: bytes) -> None:
    files = adapter_files(10_000)
    hub.repos.create(hub.name("sql"), files | {CONFIG_FILE: content})
    assert type(Client(hub, tmp_path).error(hub.name("sql"))) is InvalidAdapterError
    assert not hub.proxy.seen(WEIGHTS)


def test_a_huge_configuration_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    huge = json.dumps({"r": 8, "more": "x" * (5 << 20)}).encode()
    hub.repos.create(hub.name("sql"), adapter_files(10_000) | {CONFIG_FILE: huge})
    assert type(Client(hub, tmp_path).error(hub.name("sql"))) is InvalidAdapterError
    assert not hub.proxy.seen(f"{CONFIG}|{WEIGHTS}", "GET")


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
def test_weights_that_are_none(hub: Hub, tmp_path: Path, content: bytes) -> None:
    hub.repos.create(hub.name("sql"), adapter_files(10_000) | {WEIGHTS_FILE: content})
    client = Client(hub, tmp_path)
    assert type(client.error(hub.name("sql"))) is InvalidAdapterError
    assert not list(client.store.glob("partial/*"))


def test_a_repository_without_an_adapter(hub: Hub, tmp_path: Path) -> None:
    hub.repos.create(hub.name("sql"), {"adapter_model.bin": b"pickle", CONFIG_FILE: b"{}"})
    error = Client(hub, tmp_path).error(hub.name("sql"))
    assert type(error) is AdapterNotFoundError
    assert "converted" in str(error)
    assert not isinstance(error, SourceError)
