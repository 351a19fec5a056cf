"""Whatever the Hub answers instead, wherever it does: the right error of ours, or success."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lora_cache.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    LoraCacheError,
    SourceError,
)
from lora_cache.sources import http
from tests.hub.faults import (
    BROKEN,
    ENTRY_NOT_FOUND,
    FORBIDDEN,
    GATED,
    REPO_NOT_FOUND,
    REVISION_NOT_FOUND,
    UNAUTHORIZED,
    UNAVAILABLE,
    Cut,
    Delay,
    Drop,
    Fault,
    Slow,
    Stall,
    Status,
    too_many_requests,
)
from tests.hub.fixtures import Hub
from tests.store.clients import CONFIG, LIST, RESOLVE, WEIGHTS, Client, create

PLACES = pytest.mark.parametrize(
    "place", [RESOLVE, LIST, CONFIG, WEIGHTS], ids=["resolve", "list", "config", "weights"]
)

FINAL: list[tuple[Status, type[LoraCacheError], str]] = [
    (UNAUTHORIZED, AccessDeniedError, "HF_TOKEN"),
    (FORBIDDEN, AccessDeniedError, "HF_TOKEN"),
    (GATED, AccessDeniedError, "gated"),
    (REPO_NOT_FOUND, AdapterNotFoundError, "not on the Hub, or private"),
    (Status(401, "RepoNotFound", "Repository not found"), AdapterNotFoundError, "private"),
    (REVISION_NOT_FOUND, AdapterNotFoundError, "revision"),
    (ENTRY_NOT_FOUND, AdapterNotFoundError, "not there"),
    (Status(451, "DisabledRepo"), AccessDeniedError, "disabled"),
]

PASSING: list[Fault] = [BROKEN, UNAVAILABLE, Drop(), Drop(reset=True), too_many_requests(0)]


@pytest.fixture(params=[False, True], ids=["olah", "like-the-hub"])
def real(request: pytest.FixtureRequest, hub: Hub) -> bool:
    hub.proxy.like_the_hub(request.param)
    return bool(request.param)


@PLACES
def test_what_is_final_is_said_at_once(hub: Hub, tmp_path: Path, place: str) -> None:
    files = create(hub)
    for fault, kind, words in FINAL:
        client = Client(hub, tmp_path)
        hub.proxy.forget()
        hub.proxy.on(fault, place)
        error = client.error(hub.name("sql"))
        assert type(error) is kind
        assert words in str(error)
        assert hub.name("sql") in str(error)
        assert len(hub.proxy.seen(place)) == 1
        client.check(client.get(hub.name("sql")), files)


@PLACES
def test_what_passes_is_tried_again(hub: Hub, tmp_path: Path, place: str, real: bool) -> None:
    files = create(hub)
    for fault in PASSING:
        client = Client(hub, tmp_path)
        hub.proxy.forget()
        hub.proxy.on(fault, place)
        client.check(client.get(hub.name("sql")), files)
        usual = 2 if real and place == WEIGHTS else 1  # the redirect, and the CDN
        assert len(hub.proxy.seen(place)) == usual + 1


@PLACES
def test_what_does_not_pass_is_reported(
    hub: Hub, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SILENT_S", 0.0)
    files = create(hub)
    for fault in PASSING:
        client = Client(hub, tmp_path)
        hub.proxy.forget()
        rule = hub.proxy.on(fault, place, times=None)
        error = client.error(hub.name("sql"))
        assert type(error) is SourceError
        assert hub.name("sql") in str(error)
        assert 3 <= len(hub.proxy.seen(place)) <= 5
        hub.proxy.off(rule)
        client.check(client.get(hub.name("sql")), files)


@pytest.mark.parametrize("place", [RESOLVE, WEIGHTS], ids=["resolve", "weights"])
def test_a_server_may_ask_for_time(hub: Hub, tmp_path: Path, place: str) -> None:
    files = create(hub)
    client = Client(hub, tmp_path)
    hub.proxy.on(too_many_requests(1), place)
    start = time.monotonic()
    client.check(client.get(hub.name("sql")), files)
    assert time.monotonic() - start >= 1


@PLACES
def test_but_not_for_too_much_time(hub: Hub, tmp_path: Path, place: str) -> None:
    create(hub)
    client = Client(hub, tmp_path)
    hub.proxy.on(too_many_requests(31), place, times=None)
    error = client.error(hub.name("sql"))
    assert isinstance(error, SourceError)
    assert error.retry_after_s == 31
    assert len(hub.proxy.seen(place)) == 1


@PLACES
def test_a_server_that_says_nothing(hub: Hub, tmp_path: Path, place: str) -> None:
    """Questions wait once; a file, whose transfer may have come far, is tried again."""
    files = create(hub)
    client = Client(hub, tmp_path)
    client.impatient(place, 0.3)
    hub.proxy.on(Delay(100), place, times=None)
    start = time.monotonic()
    assert type(client.error(hub.name("sql"))) is SourceError
    assert time.monotonic() - start < 100
    times = 1 if place in (RESOLVE, LIST) else 5
    hub.proxy.wait_for(place, times=times)  # it may see the last one after the client has left
    assert len(hub.proxy.seen(place)) == times
    hub.proxy.off()
    client.forget()
    client.check(client.get(hub.name("sql")), files)


def test_an_answer_that_does_not_end(hub: Hub, tmp_path: Path) -> None:
    create(hub)
    client = Client(hub, tmp_path)
    client.impatient(RESOLVE, 0.5)
    hub.proxy.on(Stall(10), RESOLVE)  # it ends when the client goes
    assert type(client.error(hub.name("sql"))) is SourceError
    hub.proxy.wait_for(RESOLVE)
    assert len(hub.proxy.seen(RESOLVE)) == 1


def test_half_an_answer_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    client = Client(hub, tmp_path)
    hub.proxy.on(Cut(5), RESOLVE)
    client.check(client.get(hub.name("sql")), files)
    assert len(hub.proxy.seen(RESOLVE)) == 2


def test_a_slow_answer_is_an_answer(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    client = Client(hub, tmp_path)
    client.impatient(RESOLVE, 1.5)
    hub.proxy.on(Slow(200), RESOLVE)
    start = time.monotonic()
    client.check(client.get(hub.name("sql")), files)
    assert time.monotonic() - start > 1.5
    assert len(hub.proxy.seen(RESOLVE)) == 1


def test_a_hub_out_of_reach_is_not_waited_for_again_and_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SILENT_S", 1000.0)
    client = Client(hub, tmp_path, timeout_s=0.3)
    hub.proxy.on(Delay(100), times=None)
    client.error(hub.name("a"))
    hub.proxy.wait_for("")
    assert len(hub.proxy.requests) == 1
    for name in "bcdefg":
        assert "a moment ago" in str(client.error(hub.name(name)))
    assert len(hub.proxy.requests) == 1


def test_and_is_asked_again_after_a_while(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SILENT_S", 1000.0)
    files = create(hub)
    client = Client(hub, tmp_path)
    rule = hub.proxy.on(Drop(), RESOLVE, times=None)
    client.error(hub.name("sql"))
    asked = len(hub.proxy.requests)
    client.error(hub.name("sql"))
    assert len(hub.proxy.requests) == asked
    hub.proxy.off(rule)
    client.source._http._silent_until -= 1000  # a while
    client.check(client.get(hub.name("sql")), files)


def test_errors_of_one_repository_are_not_those_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    client = Client(hub, tmp_path)
    hub.proxy.on(BROKEN, "/other/", times=None)
    client.error(hub.name("other"))
    client.check(client.get(hub.name("sql")), files)
