"""A Hub for tests: one server for all of them; repositories and a proxy for each."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub.proxy import HubProxy
from tests.hub.repos import HubRepos
from tests.hub.server import OlahServer, olah_python

_NUMBERS = itertools.count(1)

USERS_OWN = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_CACHE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HUGGING_FACE_HUB_TOKEN",
)


@dataclass(frozen=True)
class Hub:
    """What a test has of the Hub."""

    endpoint: str  #: for `HfApi(endpoint=…)`
    org: str  #: an organization of this test alone
    repos: HubRepos
    proxy: HubProxy
    home: Path  #: HF_HOME of this test, empty
    cache_dir: Path  #: for `snapshot_download(cache_dir=…)`

    def name(self, name: str) -> str:
        """`org/name`, in the organization of this test."""
        return f"{self.org}/{name}"


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OlahServer]:
    if olah_python() is None:
        pytest.skip("no Hub server: run `make .venv/hub/.ready`, or set LORA_CACHE_OLAH")
    with OlahServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(hub_server: OlahServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub, for this process and those it starts: neither offline nor with the user's token."""
    assert hub_server.running, hub_server.log
    home = tmp_path / "hf-home"
    org = f"org-{next(_NUMBERS)}-{uuid.uuid4().hex[:6]}"
    repos = HubRepos(hub_server.mirror)
    with HubProxy(hub_server.url, mirror=hub_server.mirror) as proxy:
        _point_huggingface_hub_to(proxy.url, home, monkeypatch)
        yield Hub(proxy.url, org, repos, proxy, home, home / "hub")
    repos.delete(org)
    assert not proxy.errors, proxy.errors


def _point_huggingface_hub_to(endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    for name in USERS_OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # It has read its environment already, if it was imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    files = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    if hasattr(huggingface_hub, "close_session"):  # connections to the proxy of another test
        huggingface_hub.close_session()
