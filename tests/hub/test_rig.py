"""The rig itself: the real client against the real server, and each fault as a client sees it."""

from __future__ import annotations

import hashlib
import http.client
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lora_cache.manifest import read_manifest
from tests.hub import faults
from tests.hub.faults import Call, Cut, Delay, Drop, Flip, Short, Slow, Stall, WrongLength
from tests.hub.files import CONFIG, WEIGHTS, adapter_files, clutter, files_of
from tests.hub.fixtures import Hub
from tests.hub.parts import PATTERNS, Repo, api, body_of, fetch
from tests.hub.server import OlahServer
from tests.real.parts import write_adapter

hub_errors = pytest.importorskip("huggingface_hub.errors")


def test_the_client_sees_commits_branches_and_tags(hub: Hub) -> None:
    repo = Repo(hub)
    second = hub.repos.commit(repo.name, {CONFIG: b'{"r": 8}'})
    hub.repos.tag(repo.name, "v1", repo.commit)
    hub.repos.tag(repo.name, "v2", annotated=True)
    hub.repos.branch(repo.name, "old", repo.commit)
    expected = {"main": second, "v1": repo.commit, "v2": second, "old": repo.commit}
    expected |= {repo.commit: repo.commit, repo.commit[:8]: repo.commit}
    for revision, commit in expected.items():
        assert api(hub).model_info(repo.name, revision=revision).sha == commit
        status, headers, _ = fetch(repo.url(revision=revision), "HEAD")
        assert (status, headers["x-repo-commit"]) == (200, commit)
    refs = api(hub).list_repo_refs(repo.name)
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == {
        name: commit
        for name, commit in expected.items()
        if name not in (repo.commit, repo.commit[:8])
    }


@pytest.mark.parametrize("lfs", [True, False])
def test_sizes_and_hashes_are_those_of_the_file(hub: Hub, lfs: bool) -> None:
    repo = Repo(hub, lfs=lfs)
    blob = hashlib.sha1(b"blob %d\0" % len(repo.weights) + repo.weights).hexdigest()
    sha256 = hashlib.sha256(repo.weights).hexdigest()
    _, headers, _ = fetch(repo.url(), "HEAD")
    assert headers["etag"] == (sha256 if lfs else blob)
    assert int(headers["content-length"]) == len(repo.weights)
    tree = api(hub).list_repo_tree(repo.name, revision="main", recursive=True)
    weights = next(file for file in tree if file.path == WEIGHTS)
    assert weights.size == len(repo.weights)
    assert (weights.lfs.sha256 == sha256) if lfs else (weights.blob_id == blob)
    # What a GET does not tell: its size, its hash; and it ignores Range.
    status, headers, body = fetch(repo.url(), headers={"Range": "bytes=1000-"})
    assert (status, body) == (200, repo.weights)
    assert not headers.keys() & {"content-length", "etag", "x-repo-commit", "accept-ranges"}


@pytest.mark.parametrize("real", [False, True])
def test_a_snapshot_is_the_adapter_and_nothing_else(hub: Hub, real: bool) -> None:
    repo = Repo(hub)
    hub.repos.commit(repo.name, clutter())
    hub.proxy.like_the_hub(real)
    path = repo.snapshot()
    assert {name: (path / name).read_bytes() for name in PATTERNS} == repo.files
    assert sorted(file.name for file in path.iterdir()) == PATTERNS
    assert read_manifest(path).rank == 8
    assert all(WEIGHTS in s.target or CONFIG in s.target for s in hub.proxy.seen("/resolve/"))
    assert hub.proxy.nbytes(r"/resolve/.*/adapter_config") == len(repo.files[CONFIG])
    assert hub.proxy.seen("/tree/", "GET")[0].status in (200, 307)


def test_adapters_of_any_size_are_valid_and_distinct(hub: Hub, tmp_path: Path) -> None:
    for nbytes in (10_000, 1_000_000, 20_000_000):
        directory = tmp_path / str(nbytes)
        directory.mkdir()
        for name, content in adapter_files(nbytes, seed=nbytes).items():
            (directory / name).write_bytes(content)
        assert (directory / WEIGHTS).stat().st_size == pytest.approx(nbytes, rel=0.12)
        assert read_manifest(directory).target_modules == ("q_proj", "v_proj")
    assert adapter_files(seed=1) == adapter_files(seed=1) != adapter_files(seed=2)
    fitting = files_of(write_adapter(tmp_path / "fitting"))
    hub.repos.create(hub.name("fitting"), fitting)
    assert (
        fetch(f"{hub.endpoint}/{hub.name('fitting')}/resolve/main/{WEIGHTS}")[2] == fitting[WEIGHTS]
    )
    with pytest.raises(ValueError, match="never be unpickled"):
        pickle.loads(clutter()["adapter_model.bin"])


def test_a_missing_repository_is_not_found(hub: Hub) -> None:
    with pytest.raises(hub_errors.RepositoryNotFoundError):
        api(hub).model_info(hub.name("nothing"), revision="main")


def test_no_answer_leads_past_the_proxy(hub: Hub, hub_server: OlahServer) -> None:
    repo = Repo(hub)
    status, headers, _ = fetch(f"{hub.endpoint}/api/models/{repo.name}/tree/main?recursive=true")
    assert status == 307
    assert headers["location"].startswith(f"{hub.endpoint}/api/models/")
    # Even if a client gives no Host by which olah could know the proxy.
    url = f"{hub.endpoint}/api/models/{repo.name}/tree/main"
    _, headers, _ = fetch(url, headers={"Host": urlsplit(hub_server.url).netloc})
    assert headers["location"].startswith(hub.endpoint)


def test_a_process_of_its_own_finds_the_hub_by_its_environment(hub: Hub) -> None:
    repo = Repo(hub)
    script = "import sys; from huggingface_hub import snapshot_download as s; print(s(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, repo.name],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == str(
        hub.cache_dir / f"models--{repo.name.replace('/', '--')}" / "snapshots" / repo.commit
    )


STATUSES = [
    (faults.UNAUTHORIZED, hub_errors.HfHubHTTPError, 401, None),
    (faults.FORBIDDEN, hub_errors.HfHubHTTPError, 403, None),
    (faults.GATED, hub_errors.GatedRepoError, 403, "GatedRepo"),
    (faults.REPO_NOT_FOUND, hub_errors.RepositoryNotFoundError, 404, "RepoNotFound"),
    (faults.ENTRY_NOT_FOUND, hub_errors.EntryNotFoundError, 404, "EntryNotFound"),
    (faults.REVISION_NOT_FOUND, hub_errors.RevisionNotFoundError, 404, "RevisionNotFound"),
    (faults.too_many_requests(7), hub_errors.HfHubHTTPError, 429, None),
    (faults.BROKEN, hub_errors.HfHubHTTPError, 500, None),
    (faults.UNAVAILABLE, hub_errors.HfHubHTTPError, 503, None),
]


@pytest.mark.parametrize(("fault", "expected", "status", "code"), STATUSES)
def test_a_status_comes_as_often_as_asked(
    hub: Hub, fault: faults.Status, expected: Any, status: int, code: str | None
) -> None:
    repo = Repo(hub, nbytes=10_000)
    rule = hub.proxy.on(fault, "/revision/", times=2)
    url = f"{hub.endpoint}/api/models/{repo.name}/revision/main"
    seen, headers, _ = fetch(url)
    assert (seen, headers.get("x-error-code")) == (status, code)
    assert headers.get("retry-after") == ("7" if status == 429 else None)
    with pytest.raises(expected) as raised:
        api(hub).model_info(repo.name, revision="main")
    assert raised.value.response.status_code == status
    assert api(hub).model_info(repo.name, revision="main").sha == repo.commit
    assert (rule.hits, rule.matched) == (2, 3)


def test_rules_follow_one_another_and_end(hub: Hub) -> None:
    repo = Repo(hub)
    hub.proxy.on(faults.too_many_requests(), WEIGHTS)
    hub.proxy.on(faults.UNAVAILABLE, WEIGHTS, method="GET", skip=1)
    forever = hub.proxy.on(faults.BROKEN, WEIGHTS, method="GET", times=None, skip=1)
    assert fetch(repo.url(CONFIG))[0] == 200
    assert [fetch(repo.url())[0] for _ in range(5)] == [429, 200, 503, 500, 500]
    assert fetch(repo.url(), "HEAD")[0] == 200
    hub.proxy.off(forever)
    assert fetch(repo.url())[0] == 200


def test_a_delay_is_before_the_headers(hub: Hub) -> None:
    repo = Repo(hub)
    hub.proxy.on(Delay(0.3), WEIGHTS, times=2)
    start = time.monotonic()
    assert fetch(repo.url())[0] == 200
    assert time.monotonic() - start >= 0.3
    with pytest.raises(TimeoutError):
        fetch(repo.url(), timeout_s=0.05)


@pytest.mark.parametrize("real", [False, True])
def test_a_slow_body_takes_its_time(hub: Hub, real: bool) -> None:
    repo = Repo(hub)
    hub.proxy.like_the_hub(real)
    hub.proxy.on(Slow(len(repo.weights) * 2), WEIGHTS)
    start = time.monotonic()
    assert body_of(repo) == repo.weights
    assert time.monotonic() - start > 0.4


@pytest.mark.parametrize("real", [False, True])
def test_a_stalled_body_stays_so_until_the_client_goes(hub: Hub, real: bool) -> None:
    repo = Repo(hub)
    hub.proxy.like_the_hub(real)
    hub.proxy.on(Stall(100_000), WEIGHTS)
    with pytest.raises(TimeoutError):
        fetch(fetch(repo.url(), "HEAD")[1].get("location", repo.url()), timeout_s=2)
    stalled = hub.proxy.seen(WEIGHTS, "GET")[-1]
    assert (stalled.nbytes, stalled.status, stalled.complete) == (100_000, 200, False)
    assert body_of(repo) == repo.weights


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_loses_the_rest(
    hub: Hub, real: bool, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Repo(hub)
    hub.proxy.like_the_hub(real)
    hub.proxy.on(Cut(4, reset=reset), WEIGHTS)
    with pytest.raises(ConnectionResetError if reset else http.client.IncompleteRead):
        body_of(repo)
    assert hub.proxy.seen(WEIGHTS, "GET")[-1].nbytes == int(len(repo.weights) * 0.4)
    # The real client goes on where it was: by Range, or from the start.  It would lose 10 MB each
    # time: it counts only whole chunks.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.proxy.on(Cut(4), WEIGHTS)
    assert (repo.snapshot() / WEIGHTS).read_bytes() == repo.weights
    resumed = hub.proxy.seen(WEIGHTS, "GET")[-1]
    assert resumed.range is not None
    assert resumed.status == (206 if real else 200)
    assert (resumed.nbytes < len(repo.weights)) is real


def test_a_dropped_request_has_no_answer(hub: Hub) -> None:
    repo = Repo(hub)
    hub.proxy.on(Drop(), WEIGHTS)
    hub.proxy.on(Drop(reset=True), WEIGHTS)
    with pytest.raises(http.client.RemoteDisconnected):
        fetch(repo.url())
    with pytest.raises(ConnectionResetError):
        fetch(repo.url())
    assert [seen.status for seen in hub.proxy.requests] == [None, None]


@pytest.mark.parametrize("real", [False, True])
def test_lengths_and_contents_can_be_wrong(hub: Hub, real: bool) -> None:
    repo = Repo(hub)
    hub.proxy.like_the_hub(real)
    nbytes = len(repo.weights)
    hub.proxy.on(WrongLength(-10), WEIGHTS)
    assert body_of(repo) == repo.weights[:-10]
    hub.proxy.on(WrongLength(10), WEIGHTS)
    with pytest.raises(http.client.IncompleteRead):
        body_of(repo)
    hub.proxy.on(Short(5), WEIGHTS)
    assert body_of(repo) == repo.weights[: nbytes // 2]
    hub.proxy.on(Flip(5, count=3), WEIGHTS)
    flipped = body_of(repo)
    assert len(flipped) == nbytes
    different = [i for i in range(nbytes) if flipped[i] != repo.weights[i]]
    assert different == [nbytes // 2 + i for i in range(3)]
    hub.proxy.on(Short(5), WEIGHTS)
    with pytest.raises(OSError, match="should be of size"):
        repo.snapshot()


def test_a_branch_can_move_between_two_requests(hub: Hub) -> None:
    repo = Repo(hub)
    moved: list[str] = []
    hub.proxy.on(
        Call(lambda: moved.append(hub.repos.commit(repo.name, adapter_files(seed=9)))), WEIGHTS
    )
    path = repo.snapshot()
    assert path.name == repo.commit  # it asked for the commit that it had resolved
    assert (path / WEIGHTS).read_bytes() == repo.weights
    assert repo.snapshot().name == moved[0] != repo.commit


def test_private_and_gated_repositories_ask_for_a_token(hub: Hub) -> None:
    repo = Repo(hub)
    hub.proxy.private(repo.name, "hf_good")
    with pytest.raises(hub_errors.RepositoryNotFoundError):
        api(hub).model_info(repo.name, revision="main")
    with pytest.raises(hub_errors.HfHubHTTPError) as raised:
        api(hub).model_info(repo.name, revision="main", token="hf_bad")
    assert not isinstance(raised.value, hub_errors.RepositoryNotFoundError)
    assert (repo.snapshot(token="hf_good") / WEIGHTS).read_bytes() == repo.weights
    assert fetch(repo.url())[0] == 401

    hub.proxy.gated(repo.name, "hf_good")
    assert api(hub).model_info(repo.name, revision="main").sha == repo.commit
    for headers, status in (({}, 401), ({"Authorization": "Bearer hf_other"}, 403)):
        refused, named, _ = fetch(repo.url(), headers=headers)
        assert (refused, named["x-error-code"]) == (status, "GatedRepo")
    assert fetch(repo.url(), headers={"Authorization": "Bearer hf_good"})[2] == repo.weights
    hub.proxy.public(repo.name)
    assert fetch(repo.url())[0] == 200
    assert "hf_" not in repr(hub.proxy.requests)
    assert [seen.authorized for seen in hub.proxy.requests[-3:]] == [True, True, False]
