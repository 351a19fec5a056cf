"""Adapters on the Hugging Face Hub.

huggingface_hub knows the addresses, the user's token and the layout of the user's cache.  The
requests are made by `http.py`, because huggingface_hub's can be neither limited, nor capped, nor
cancelled, and some of them have no timeout.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cachetools import LRUCache, TTLCache

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    InvalidAdapterError,
    LoraCacheError,
    SourceError,
)
from lora_cache.manifest import CONFIG_FILE, FILES, WEIGHTS_FILE, read_manifest, read_stamp
from lora_cache.sources.base import Body, Remote, RemoteFile
from lora_cache.sources.http import HttpClient

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_MAX_REMEMBERED = 100_000
_MOST_BYTES = 16 << 30
_STALE_S = 10.0  # for so long, what a ref meant when the Hub last answered is believed


class HubSource:
    """Resolves ``org/name[@revision]`` to a commit; a commit never changes.

    What a branch or a tag means is looked up once in `ttl_s` seconds.  Offline
    (``HF_HUB_OFFLINE``), or when the Hub does not answer, the last commit that is on this machine
    is used, and a warning says so.  What lies in the user's Hugging Face cache is used in place.
    Only the configuration and the safetensors are ever downloaded.  Thread-safe.

    Args:
        endpoint: of another Hub; ``HF_ENDPOINT`` if None.
        token: None for the user's own (``HF_TOKEN``, ``hf auth login``), False for none.
        orgs: the organisations that adapters may come from; None for all.
        ttl_s: seconds for which a branch is believed not to have moved.
        cache_dir: the user's Hugging Face cache; ``HF_HUB_CACHE`` if None.
        max_concurrent: downloads at a time.
        bytes_per_s: limit on all downloads together, or None.
        max_bytes: the largest adapter that is downloaded.
        timeout_s: seconds without an answer, or without a byte, after which a try is given up.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | bool | None = None,
        orgs: Iterable[str] | None = None,
        ttl_s: float = 300.0,
        cache_dir: Path | None = None,
        max_concurrent: int = 8,
        bytes_per_s: float | None = None,
        max_bytes: int = _MOST_BYTES,
        timeout_s: float = 10.0,
    ) -> None:
        self.max_concurrent = max_concurrent
        self.bytes_per_s = bytes_per_s
        self.max_bytes = max_bytes
        self._endpoint = endpoint
        self._token = token
        self._orgs = None if orgs is None else frozenset(orgs)
        self._cache_dir = cache_dir
        self._timeout_s = timeout_s
        self._http = HttpClient(timeout_s, _explain)
        self._commits: TTLCache[AdapterRef, str] = TTLCache(_MAX_REMEMBERED, ttl_s)
        self._stale: TTLCache[AdapterRef, str] = TTLCache(_MAX_REMEMBERED, _STALE_S)
        self._last: LRUCache[AdapterRef, str] = LRUCache(_MAX_REMEMBERED)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"HubSource(endpoint={self._endpoint!r})"  # never the token

    # ------------------------------------------------------------------ what a ref means

    def resolve(self, ref: AdapterRef) -> Adapter | Remote:
        self._require_allowed(ref)
        commit = self._commit_of(ref)
        name = ref.location.rpartition("/")[2]
        key = AdapterKey(f"hub:{ref.location}@{commit}", name)
        if (path := self._in_users_cache(ref.location, commit)) is not None:
            return Adapter(key, path, read_manifest(path), read_stamp(path))
        return Remote(key, ref, f"{ref.location}@{commit}")

    def is_current(self, ref: AdapterRef, adapter: Adapter) -> bool:
        if ref.revision is None or not _COMMIT.fullmatch(ref.revision):
            commit = self._believed(ref)
            if commit is None or not adapter.key.digest.endswith(f"@{commit}"):
                return False
        return adapter.is_unchanged()

    def _believed(self, ref: AdapterRef) -> str | None:
        """The commit of a branch or tag, if there is no need to ask for it."""
        with self._lock:
            return self._commits.get(ref) or self._stale.get(ref)

    def _commit_of(self, ref: AdapterRef) -> str:
        if ref.revision is not None and _COMMIT.fullmatch(ref.revision):
            return ref.revision
        if (known := self._believed(ref)) is not None:
            return known
        try:
            commit = self._ask(ref)
        except SourceError as error:
            commit = self._last_known(ref, error)
            with self._lock:
                self._stale[ref] = commit
        else:
            with self._lock:
                self._commits[ref] = self._last[ref] = commit
        return commit

    def _ask(self, ref: AdapterRef) -> str:
        revision = quote(ref.revision or "main", safe="")
        found = self._ask_for(ref, f"{ref.location}/revision/{revision}")
        commit = found.get("sha") if isinstance(found, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise SourceError(f"the Hub names no commit for {ref}")
        return commit

    def _last_known(self, ref: AdapterRef, error: SourceError) -> str:
        with self._lock:
            commit = self._last.get(ref)
        if commit is None:
            path = self._in_users_cache(ref.location, ref.revision)
            commit = path.name if path is not None else ""
        if not _COMMIT.fullmatch(commit):
            raise error
        logger.warning("%s; using commit %s, the last one that is known", error, commit[:12])
        return commit

    def _ask_for(self, ref: AdapterRef, path: str, form: Mapping[str, Any] | None = None) -> Any:
        """What the Hub's API answers about a model."""
        from huggingface_hub import constants

        endpoint = (self._endpoint or constants.ENDPOINT).rstrip("/")
        return self._http.ask(f"{endpoint}/api/models/{path}", self._headers(ref), str(ref), form)

    def _headers(self, ref: AdapterRef) -> dict[str, str]:
        from huggingface_hub import constants
        from huggingface_hub.utils import LocalTokenNotFoundError, build_hf_headers

        if constants.HF_HUB_OFFLINE:
            raise SourceError(f"{ref} cannot be looked up: HF_HUB_OFFLINE is set")
        try:
            return dict(build_hf_headers(token=self._token))
        except LocalTokenNotFoundError as error:
            raise AccessDeniedError(
                f"{ref}: no token is there to be used; set HF_TOKEN, or run `hf auth login`"
            ) from error

    # ------------------------------------------------------------------ the user's own cache

    def _in_users_cache(self, repo_id: str, revision: str | None) -> Path | None:
        """The snapshot of a commit, if it has both files; nothing that leads out of the cache."""
        from huggingface_hub import constants, try_to_load_from_cache

        cache = Path(self._cache_dir or constants.HF_HUB_CACHE)
        found = [
            try_to_load_from_cache(repo_id, name, cache_dir=cache, revision=revision)
            for name in (CONFIG_FILE, WEIGHTS_FILE)
        ]
        if not all(isinstance(path, str) for path in found):
            return None
        repository = (cache / f"models--{repo_id.replace('/', '--')}").resolve()
        for path in map(Path, map(str, found)):
            real = path.resolve()
            if not real.is_relative_to(repository) or not real.is_file():
                raise InvalidAdapterError(
                    f"{path} leads out of {repository}: remove it and download it again"
                )
        return Path(str(found[0])).parent

    # ------------------------------------------------------------------ fetching

    def files(self, remote: Remote) -> tuple[RemoteFile, ...]:
        repo_id, _, commit = remote.location.rpartition("@")
        listed = self._ask_for(
            remote.ref, f"{repo_id}/paths-info/{commit}", {"paths": list(FILES), "expand": False}
        )
        entries = listed if isinstance(listed, list) else []
        found = {e["path"]: e for e in entries if isinstance(e, dict) and e.get("type") == "file"}
        for name in FILES:
            if name not in found:
                raise AdapterNotFoundError(
                    f"{remote.ref} has no {name}: give a repository that holds one adapter as "
                    "peft's save_pretrained writes it (a pickle .bin must be converted first)"
                )
        return tuple(_remote_file(name, found[name], remote) for name in FILES)

    def open(self, remote: Remote, file: RemoteFile, offset: int) -> Body:
        from huggingface_hub import hf_hub_url

        repo_id, _, commit = remote.location.rpartition("@")
        url = hf_hub_url(repo_id, file.name, revision=commit, endpoint=self._endpoint)
        headers = self._headers(remote.ref)
        return self._http.open(url, headers, offset, f"{file.name} of {remote.ref}")

    # ------------------------------------------------------------------ trust

    def _require_allowed(self, ref: AdapterRef) -> None:
        org = ref.location.partition("/")[0]
        if self._orgs is not None and org not in self._orgs:
            raise AccessDeniedError(
                f"{ref}: adapters may come from {', '.join(sorted(self._orgs)) or 'nobody'} only"
            )


def _explain(code: str, what: str) -> LoraCacheError | None:
    """What the Hub means by its ``X-Error-Code``."""
    match code:
        case "GatedRepo":
            return AccessDeniedError(
                f"{what} is gated: ask its owners for access, and set HF_TOKEN"
            )
        case "RepoNotFound":
            return AdapterNotFoundError(
                f"{what} is not on the Hub, or private: check the name, and set HF_TOKEN"
            )
        case "RevisionNotFound":
            return AdapterNotFoundError(f"{what}: the repository has no such revision")
        case "DisabledRepo":
            return AccessDeniedError(f"{what} was disabled by the Hub")
    return None


def _remote_file(name: str, entry: Mapping[str, Any], remote: Remote) -> RemoteFile:
    try:
        if (lfs := entry.get("lfs")) is not None:
            return RemoteFile(name, int(lfs["size"]), f"sha256:{lfs['oid']}")
        return RemoteFile(name, int(entry["size"]), f"git-sha1:{entry['oid']}")
    except (KeyError, TypeError, ValueError):
        raise SourceError(f"{remote.ref}: the Hub describes {name} in an unknown way") from None
