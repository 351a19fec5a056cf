"""A client that sees everything, and a repository to look at, for the tests of the rig."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.hub.files import CONFIG, WEIGHTS, adapter_files
from tests.hub.fixtures import Hub

PATTERNS = [CONFIG, WEIGHTS]

Response = tuple[int, dict[str, str], bytes]


def fetch(
    url: str, method: str = "GET", *, headers: dict[str, str] | None = None, timeout_s: float = 60
) -> Response:
    """Status, headers by lower-case name, body; no redirects, no second try."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, target, headers=headers or {})
        response = connection.getresponse()
        named = {name.lower(): value for name, value in response.getheaders()}
        return response.status, named, response.read()
    finally:
        connection.close()


class Repo:
    """A repository with an adapter; its weights are in LFS or not."""

    def __init__(self, hub: Hub, *, lfs: bool = True, nbytes: int = 300_000) -> None:
        self.hub, self.name = hub, hub.name("sql")
        self.files = adapter_files(nbytes, seed=1)
        self.weights = self.files[WEIGHTS]
        self.commit = hub.repos.create(self.name, self.files, lfs=lfs)

    def url(self, path: str = WEIGHTS, revision: str = "main") -> str:
        return f"{self.hub.endpoint}/{self.name}/resolve/{revision}/{path}"

    def snapshot(self, revision: str | None = None, **more: Any) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.name,
                revision=revision,
                endpoint=self.hub.endpoint,
                cache_dir=self.hub.cache_dir,
                allow_patterns=PATTERNS,
                **more,
            )
        )


def api(hub: Hub) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.endpoint)


def body_of(repo: Repo) -> bytes:
    """The weights, from wherever they are."""
    status, named, body = fetch(repo.url())
    return fetch(named["location"])[2] if status == 302 else body
