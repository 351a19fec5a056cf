"""The real Hub's manners, and the end of servers, proxies and threads."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.hub.faults import Stall
from tests.hub.files import CONFIG, WEIGHTS
from tests.hub.fixtures import Hub
from tests.hub.parts import Repo, api, body_of, fetch
from tests.hub.proxy import HubProxy
from tests.hub.server import OlahServer

hub_errors = pytest.importorskip("huggingface_hub.errors")


def test_lfs_files_are_on_a_cdn_and_the_token_is_not(hub: Hub) -> None:
    repo = Repo(hub)
    hub.proxy.like_the_hub()
    hub.proxy.private(repo.name, "hf_good")
    status, headers, _ = fetch(repo.url(), "HEAD", headers={"Authorization": "Bearer hf_good"})
    assert (status, headers["x-repo-commit"]) == (302, repo.commit)
    assert int(headers["x-linked-size"]) == len(repo.weights)
    assert headers["x-linked-etag"].strip('"') in headers["location"]
    assert int(headers["content-length"]) != len(repo.weights)
    hub.proxy.forget()
    assert (repo.snapshot(token="hf_good") / WEIGHTS).read_bytes() == repo.weights
    by_server = {seen.server: seen.authorized for seen in hub.proxy.seen(WEIGHTS, "GET")}
    assert by_server == {"cdn": False}
    assert [s for s in hub.proxy.requests if s.server == "hub" and not s.authorized] == []
    # A URL without its signature, or with another file's name in it, opens nothing.
    assert fetch(headers["location"].partition("?")[0])[0] == 403


@pytest.mark.parametrize("lfs", [True, False])
def test_ranges(hub: Hub, lfs: bool) -> None:
    repo = Repo(hub, lfs=lfs)
    hub.proxy.like_the_hub()
    _, headers, _ = fetch(repo.url(), "HEAD")
    url = headers.get("location", repo.url())
    nbytes = len(repo.weights)
    for asked, first, stop in (
        ("bytes=1000-", 1000, nbytes),
        ("bytes=10-19", 10, 20),
        ("bytes=-7", nbytes - 7, nbytes),
        (f"bytes=5-{nbytes + 5}", 5, nbytes),
    ):
        status, headers, body = fetch(url, headers={"Range": asked})
        assert (status, body) == (206, repo.weights[first:stop])
        assert headers["content-range"] == f"bytes {first}-{stop - 1}/{nbytes}"
    status, headers, _ = fetch(url, headers={"Range": f"bytes={nbytes}-"})
    assert (status, headers["content-range"]) == (416, f"bytes */{nbytes}")
    etag = fetch(url, "HEAD")[1]["etag"]
    for known, status in ((etag, 206), ('"other"', 200)):
        assert fetch(url, headers={"Range": "bytes=9-", "If-Range": known})[0] == status


def test_a_plain_file_tells_everything_on_get(hub: Hub) -> None:
    repo = Repo(hub)
    hub.proxy.like_the_hub()
    for method in ("HEAD", "GET"):
        status, headers, body = fetch(repo.url(CONFIG), method)
        assert (status, headers["x-repo-commit"]) == (200, repo.commit)
        assert int(headers["content-length"]) == len(repo.files[CONFIG])
        assert len(headers["etag"].strip('"')) == 40
        assert body == (repo.files[CONFIG] if method == "GET" else b"")


def test_what_is_missing_is_told_apart(hub: Hub) -> None:
    repo = Repo(hub)
    hub.proxy.like_the_hub()
    for revision in ("nothing", "not/there", "0" * 40):
        with pytest.raises(hub_errors.RevisionNotFoundError):
            api(hub).model_info(repo.name, revision=revision)
        quoted = revision.replace("/", "%2F")
        assert fetch(repo.url(revision=quoted))[1]["x-error-code"] == "RevisionNotFound"
    with pytest.raises(hub_errors.RepositoryNotFoundError):
        api(hub).model_info(hub.name("nothing"))
    for method in ("HEAD", "GET"):
        status, headers, _ = fetch(repo.url("nothing.bin"), method)
        assert (status, headers["x-error-code"]) == (404, "EntryNotFound")


def test_branches_with_a_slash_and_no_revision_at_all(hub: Hub) -> None:
    repo = Repo(hub)
    second = hub.repos.commit(repo.name, {CONFIG: b'{"r": 4}'}, branch="feat/x")
    hub.repos.branch(repo.name, "feat/old", repo.commit)
    hub.proxy.like_the_hub()
    assert api(hub).model_info(repo.name).sha == repo.commit
    assert api(hub).model_info(repo.name, revision="feat/old").sha == repo.commit
    assert api(hub).model_info(repo.name, revision="feat/x").sha == second
    assert fetch(repo.url(CONFIG, "feat%2Fx"))[2] == b'{"r": 4}'
    assert repo.snapshot("feat/old").name == repo.commit


def test_the_log_is_live(hub: Hub) -> None:
    repo = Repo(hub)
    hub.proxy.like_the_hub()
    hub.proxy.on(Stall(1000), f"/[0-9a-f]+/{WEIGHTS}", method="GET")
    failed: list[BaseException] = []

    def download() -> None:
        try:
            body_of(repo)
        except BaseException as error:
            failed.append(error)

    client = threading.Thread(target=download)
    client.start()
    hub.proxy.wait_for(WEIGHTS, times=2)
    deadline = time.monotonic() + 60
    while hub.proxy.nbytes(f"/[0-9a-f]+/{WEIGHTS}") < 1000 and time.monotonic() < deadline:
        time.sleep(0.01)
    seen = hub.proxy.requests[-1]
    assert (seen.server, seen.status, seen.nbytes, seen.complete) == ("cdn", 200, 1000, False)
    hub.proxy.stop()  # ends the stalled answer, so also the client
    client.join(60)
    assert not client.is_alive()
    assert len(failed) == 1
    with pytest.raises(TimeoutError):
        hub.proxy.wait_for("nothing", timeout_s=0.01)


def test_a_stopped_proxy_leaves_no_thread_and_no_port(
    hub_server: OlahServer, tmp_path: Path
) -> None:
    before = set(threading.enumerate())
    with HubProxy(hub_server.url, mirror=tmp_path) as proxy:
        idle = socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])))
        assert fetch(f"{proxy.url}/api/models/a/b/refs")[0] == 404
        assert set(threading.enumerate()) > before
    assert idle.recv(1) == b""
    idle.close()
    assert set(threading.enumerate()) <= before  # those of others may end, too
    with pytest.raises(ConnectionRefusedError):
        fetch(proxy.url)


def test_a_stopped_server_leaves_no_process(hub_server: OlahServer, tmp_path: Path) -> None:
    server = OlahServer(tmp_path / "own")
    server.directory.mkdir()
    with server:
        assert server.url != hub_server.url
        assert fetch(f"{server.url}/api/models/a/b/refs")[0] == 404
        assert server._process is not None
        group = server._process.pid
    assert not server.running
    deadline = time.monotonic() + 60
    while is_there(group):  # those that it had started may take a moment to die
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.stop()
    assert hub_server.running


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_that_does_not_start_says_why(hub_server: OlahServer, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module named olah; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"ended with 3:\nno module named olah"):
        OlahServer(tmp_path, broken).start()
