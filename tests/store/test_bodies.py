"""Bodies that break off, stall, lie about their length or are other ones than promised."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lora_cache.errors import InvalidAdapterError, SourceError
from tests.hub.faults import Call, Cut, Drop, Flip, Short, Slow, Stall, WrongLength
from tests.hub.files import adapter_files
from tests.hub.fixtures import Hub
from tests.store.clients import CONFIG, LIST, WEIGHTS, Client, create

REAL = pytest.mark.parametrize("real", [False, True], ids=["olah", "like-the-hub"])
BODY = r"adapter_model\.safetensors(\?Exp.*)?$"


def body_requests(hub: Hub) -> list[tuple[str | None, int]]:
    """Range and bytes of the requests for the weights' bytes (and not for a redirect)."""
    return [
        (seen.range, seen.nbytes)
        for seen in hub.proxy.seen(WEIGHTS, "GET")
        if seen.status in (200, 206)
    ]


@REAL
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_cut_at_every_tenth(hub: Hub, tmp_path: Path, real: bool, reset: bool) -> None:
    files = create(hub)
    nbytes = len(files["adapter_model.safetensors"])
    hub.proxy.like_the_hub(real)
    for tenths in range(10):
        client = Client(hub, tmp_path)
        hub.proxy.forget()
        hub.proxy.on(Cut(tenths, reset=reset), WEIGHTS)
        client.check(client.get(hub.name("sql")), files)
        first, second = body_requests(hub)
        sent = int(nbytes * tenths / 10)
        assert first == (None, sent)
        # A reset may destroy what was on its way; a plain end does not.
        if real and sent and not reset:
            assert second == (f"bytes={sent}-", nbytes - sent)
        elif not reset:
            assert second[0] == (f"bytes={sent}-" if sent else None)
            assert second[1] == nbytes


@REAL
def test_cut_again_and_again(hub: Hub, tmp_path: Path, real: bool) -> None:
    files = create(hub)
    nbytes = len(files["adapter_model.safetensors"])
    hub.proxy.like_the_hub(real)
    client = Client(hub, tmp_path)
    rule = hub.proxy.on(Cut(4), WEIGHTS, times=12 if real else None)
    if real:  # 40 % of the rest each time; what comes is kept, so it ends well
        client.check(client.get(hub.name("sql")), files)
        assert sum(nbytes for _, nbytes in body_requests(hub)) == nbytes
        return
    assert type(client.error(hub.name("sql"))) is SourceError
    assert len(body_requests(hub)) <= 6
    hub.proxy.off(rule)
    client.check(client.get(hub.name("sql")), files)


def test_cuts_here_and_there_without_range_end(hub: Hub, tmp_path: Path) -> None:
    """Being now further and now less far is no progress."""
    create(hub)
    client = Client(hub, tmp_path)
    for number, tenths in enumerate([2, 6] * 20):
        hub.proxy.on(Cut(tenths), WEIGHTS, skip=number)
    assert type(client.error(hub.name("sql"))) is SourceError
    assert len(body_requests(hub)) <= 7


@REAL
def test_what_came_in_an_earlier_process_is_kept(hub: Hub, tmp_path: Path, real: bool) -> None:
    files = create(hub)
    nbytes = len(files["adapter_model.safetensors"])
    hub.proxy.like_the_hub(real)
    client = Client(hub, tmp_path)
    hub.proxy.on(Cut(5), WEIGHTS)
    rule = hub.proxy.on(Drop(), WEIGHTS, times=None, skip=2 if real else 1)
    client.error(hub.name("sql"))
    hub.proxy.off(rule)
    hub.proxy.forget()
    client.forget()
    client.check(client.get(hub.name("sql")), files)
    assert not hub.proxy.seen(CONFIG)
    half = int(nbytes / 2)
    assert body_requests(hub) == [(f"bytes={half}-", nbytes - half if real else nbytes)]


def test_what_is_left_may_be_rubbish(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    nbytes = len(files["adapter_model.safetensors"])
    for rubbish in (b"x" * 1000, b"x" * nbytes, b"x" * (nbytes + 1000), b""):
        client = Client(hub, tmp_path)
        rule = hub.proxy.on(Cut(5), WEIGHTS, times=None)
        client.error(hub.name("sql"))
        hub.proxy.off(rule)
        (left,) = client.store.glob("partial/*/adapter_model.safetensors")
        left.write_bytes(rubbish)
        (left.parent / "stranger.tmp").write_bytes(b"x")
        hub.proxy.like_the_hub()
        client.check(client.get(hub.name("sql")), files)
        hub.proxy.like_the_hub(False)


@REAL
def test_a_stalled_body_is_given_up_and_resumed(hub: Hub, tmp_path: Path, real: bool) -> None:
    files = create(hub)
    nbytes = len(files["adapter_model.safetensors"])
    hub.proxy.like_the_hub(real)
    client = Client(hub, tmp_path)
    # Only once: the second time it is to get all of it, however slow the machine is.
    client.impatient(WEIGHTS, 2, times=1)
    hub.proxy.on(Stall(10_000), WEIGHTS)  # it ends when the client goes
    client.check(client.get(hub.name("sql")), files)
    second = body_requests(hub)[-1]
    assert second == ("bytes=10000-", nbytes - 10_000 if real else nbytes)


@REAL
def test_a_slow_body_takes_its_time(hub: Hub, tmp_path: Path, real: bool) -> None:
    """Longer than the timeout in all, but never without a byte for so long."""
    files = create(hub)
    hub.proxy.like_the_hub(real)
    client = Client(hub, tmp_path)
    client.impatient(WEIGHTS, 1.5)
    hub.proxy.on(Slow(16_000), WEIGHTS)
    start = time.monotonic()
    client.check(client.get(hub.name("sql")), files)
    assert time.monotonic() - start > 1.5
    assert len(body_requests(hub)) == 1


@REAL
@pytest.mark.parametrize("by", [-1000, 1000])
def test_a_wrong_content_length(hub: Hub, tmp_path: Path, real: bool, by: int) -> None:
    files = create(hub)
    hub.proxy.like_the_hub(real)
    client = Client(hub, tmp_path)
    hub.proxy.on(WrongLength(by), WEIGHTS)
    client.check(client.get(hub.name("sql")), files)
    assert len(body_requests(hub)) <= 2


@REAL
@pytest.mark.parametrize("place", [CONFIG, WEIGHTS], ids=["config", "weights"])
def test_a_clean_end_too_early(hub: Hub, tmp_path: Path, real: bool, place: str) -> None:
    files = create(hub)
    hub.proxy.like_the_hub(real)
    client = Client(hub, tmp_path)
    hub.proxy.on(Short(3), place)
    client.check(client.get(hub.name("sql")), files)


@REAL
@pytest.mark.parametrize("place", [CONFIG, WEIGHTS], ids=["config", "weights"])
@pytest.mark.parametrize("tenths", [0, 5, 9.9])
def test_wrong_content_once(
    hub: Hub, tmp_path: Path, real: bool, place: str, tenths: float
) -> None:
    files = create(hub)
    hub.proxy.like_the_hub(real)
    client = Client(hub, tmp_path)
    hub.proxy.on(Flip(tenths), place)
    client.check(client.get(hub.name("sql")), files)


@REAL
@pytest.mark.parametrize("lfs", [False, True])
@pytest.mark.parametrize("place", [CONFIG, WEIGHTS], ids=["config", "weights"])
def test_wrong_content_always(hub: Hub, tmp_path: Path, real: bool, lfs: bool, place: str) -> None:
    files = create(hub, lfs=lfs)
    hub.proxy.like_the_hub(real)
    client = Client(hub, tmp_path)
    rule = hub.proxy.on(Flip(), place, times=None)
    error = client.error(hub.name("sql"))
    assert type(error) is InvalidAdapterError
    assert "sends another" in str(error)
    assert sum(seen.status == 200 for seen in hub.proxy.seen(place, "GET")) == 2
    assert not client.files() or {path.name for path in client.files()} == {"index.sqlite"}
    hub.proxy.off(rule)
    client.check(client.get(hub.name("sql")), files)


def test_a_cut_and_then_wrong_content(hub: Hub, tmp_path: Path) -> None:
    """The digest covers what an earlier request brought."""
    files = create(hub)
    hub.proxy.like_the_hub()
    client = Client(hub, tmp_path)
    hub.proxy.on(Flip(1), WEIGHTS)
    hub.proxy.on(Cut(5), WEIGHTS)
    client.check(client.get(hub.name("sql")), files)
    ranges = [asked for asked, _ in body_requests(hub)]
    assert ranges[0] is ranges[2] is None
    assert ranges[1] is not None


def test_the_branch_moves_between_resolve_and_download(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    name = hub.name("sql")
    old = hub.repos.revision(name)
    for place in (LIST, CONFIG, WEIGHTS):
        client = Client(hub, tmp_path)
        hub.repos.branch(name, "main", old)
        new: list[str] = []
        hub.proxy.on(Call(lambda new=new: new.append(push(hub, name))), place)  # type: ignore[misc]
        adapter = client.get(name)
        assert adapter.key.digest == f"hub:{name}@{old}"
        client.check(adapter, files)
        client.forget()
        assert client.get(name).key.digest == f"hub:{name}@{new[0]}"


def push(hub: Hub, name: str) -> str:
    return hub.repos.commit(name, adapter_files(8_000, seed=77))


def test_the_token_does_not_follow_to_the_cdn(hub: Hub, tmp_path: Path) -> None:
    files = create(hub)
    hub.proxy.like_the_hub()
    client = Client(hub, tmp_path, token="hf_secret")
    hub.proxy.on(Cut(5), BODY)
    client.check(client.get(hub.name("sql")), files)
    on_hub = [seen for seen in hub.proxy.requests if seen.server == "hub"]
    on_cdn = [seen for seen in hub.proxy.requests if seen.server == "cdn"]
    assert all(seen.authorized for seen in on_hub)
    assert len(on_cdn) == 2
    assert not any(seen.authorized for seen in on_cdn)
