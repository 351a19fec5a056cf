"""Adapters on the Hugging Face Hub.

huggingface_hub resolves, lists and authenticates; the files are streamed by `http.py`, because its
downloads can be neither limited, nor capped, nor cancelled.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cachetools import TTLCache

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
from lora_cache.sources.http import HttpClient, status_error

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_MAX_REMEMBERED = 100_000
_MOST_BYTES = 16 << 30


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
        self._http = HttpClient(timeout_s)
        self._commits: TTLCache[AdapterRef, str] = TTLCache(_MAX_REMEMBERED, ttl_s)
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
            with self._lock:
                commit = self._commits.get(ref)
            if commit is None or not adapter.key.digest.endswith(f"@{commit}"):
                return False
        return adapter.is_unchanged()

    def _commit_of(self, ref: AdapterRef) -> str:
        if ref.revision is not None and _COMMIT.fullmatch(ref.revision):
            return ref.revision
        with self._lock:
            if (known := self._commits.get(ref)) is not None:
                return known
        try:
            commit = self._ask(ref)
        except SourceError as error:
            commit = self._last_in_users_cache(ref, error)
        with self._lock:
            self._commits[ref] = commit
        return commit

    def _ask(self, ref: AdapterRef) -> str:
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise SourceError(f"{ref} cannot be looked up: HF_HUB_OFFLINE is set")
        with self._errors(ref):
            api = HfApi(endpoint=self._endpoint, token=self._token)
            found = api.model_info(
                ref.location, revision=ref.revision or "main", timeout=self._timeout_s
            )
        if not _COMMIT.fullmatch(found.sha or ""):
            raise SourceError(f"the Hub names no commit for {ref}")
        return str(found.sha)

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

    def _last_in_users_cache(self, ref: AdapterRef, error: SourceError) -> str:
        path = self._in_users_cache(ref.location, ref.revision)
        if path is None or not _COMMIT.fullmatch(path.name):
            raise error
        logger.warning("%s; using commit %s of the Hugging Face cache", error, path.name[:12])
        return path.name

    # ------------------------------------------------------------------ fetching

    def files(self, remote: Remote) -> tuple[RemoteFile, ...]:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.hf_api import RepoFile

        repo_id, _, commit = remote.location.rpartition("@")
        if constants.HF_HUB_OFFLINE:
            raise SourceError(f"{remote.ref} is not on this machine, and HF_HUB_OFFLINE is set")
        with self._errors(remote.ref):
            api = HfApi(endpoint=self._endpoint, token=self._token)
            listed = api.get_paths_info(repo_id, list(FILES), revision=commit)
        found = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        for name in FILES:
            if name not in found:
                raise AdapterNotFoundError(
                    f"{remote.ref} has no {name}: give a repository that holds one adapter as "
                    "peft's save_pretrained writes it (a pickle .bin must be converted first)"
                )
        return tuple(_remote_file(found[name]) for name in FILES)

    def open(self, remote: Remote, file: RemoteFile, offset: int) -> Body:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        repo_id, _, commit = remote.location.rpartition("@")
        url = hf_hub_url(repo_id, file.name, revision=commit, endpoint=self._endpoint)
        headers = build_hf_headers(token=self._token)
        return self._http.open(url, headers, offset, f"{file.name} of {remote.ref}")

    # ------------------------------------------------------------------ trust, errors

    def _require_allowed(self, ref: AdapterRef) -> None:
        org = ref.location.partition("/")[0]
        if self._orgs is not None and org not in self._orgs:
            raise AccessDeniedError(
                f"{ref}: adapters may come from {', '.join(sorted(self._orgs)) or 'nobody'} only"
            )

    @contextmanager
    def _errors(self, ref: AdapterRef) -> Iterator[None]:
        """huggingface_hub's errors, and those of whatever HTTP client it uses, as ours."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except LoraCacheError:
            raise
        except GatedRepoError as error:
            raise AccessDeniedError(
                f"{ref} is gated: ask its owners for access, and set HF_TOKEN"
            ) from error
        except RepositoryNotFoundError as error:
            raise AdapterNotFoundError(
                f"{ref} is not on the Hub, or private: check the name, and set HF_TOKEN"
            ) from error
        except RevisionNotFoundError as error:
            raise AdapterNotFoundError(f"{ref.location} has no revision {ref.revision}") from error
        except HfHubHTTPError as error:
            raise status_error(error.response, str(ref)) from error
        except Exception as error:  # it has changed its HTTP client before, and will again
            raise SourceError(
                f"the Hub does not answer for {ref} ({type(error).__name__})"
            ) from error


def _remote_file(entry: Any) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.path, int(entry.lfs.size), f"sha256:{entry.lfs.sha256}")
    return RemoteFile(entry.path, int(entry.size), f"git-sha1:{entry.blob_id}")
