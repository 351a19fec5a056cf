"""Adapters on the Hugging Face Hub, in the user's own Hugging Face cache."""

from __future__ import annotations

from pathlib import Path

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import AdapterNotFoundError, InvalidAdapterError
from lora_cache.manifest import FILES, read_manifest


class HubSource:
    """Resolves ``org/name[@revision]`` to a commit, once per process, and downloads it.

    Nothing but the configuration and the safetensors is ever downloaded.  Token, endpoint, cache
    directory and offline mode are huggingface_hub's own (``HF_TOKEN``, ``HF_ENDPOINT``,
    ``HF_HOME``, ``HF_HUB_OFFLINE``).  Thread-safe.
    """

    def resolve(self, ref: AdapterRef) -> Adapter:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            path = snapshot_download(
                ref.location, revision=ref.revision, allow_patterns=list(FILES)
            )
        except GatedRepoError as error:
            raise AdapterNotFoundError(
                f"{ref} is gated: ask its owners for access, and set HF_TOKEN"
            ) from error
        except RepositoryNotFoundError as error:
            raise AdapterNotFoundError(
                f"{ref} is not on the Hub, or private: check the name, and set HF_TOKEN"
            ) from error
        except RevisionNotFoundError as error:
            raise AdapterNotFoundError(f"{ref.location} has no revision {ref.revision}") from error
        except LocalEntryNotFoundError as error:
            raise AdapterNotFoundError(
                f"{ref} is not in the Hugging Face cache, and the Hub cannot be reached"
            ) from error
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise InvalidAdapterError(f"{ref} could not be downloaded: {error}") from error
        snapshot = Path(path)
        # The cache keeps each commit in a directory of its name, and never changes it.
        key = AdapterKey(f"hub:{ref.location}@{snapshot.name}", ref.location.rpartition("/")[2])
        return Adapter(key, snapshot, read_manifest(snapshot))

    def is_current(self, ref: AdapterRef, adapter: Adapter) -> bool:
        return True
