"""`origin.json`: what an adapter in the store says of where it came from.

It lies beside the adapter's files, so the index can be rebuilt from what is there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_cache.adapter import AdapterKey
from lora_cache.errors import InvalidAdapterError
from lora_cache.sources.base import RemoteFile

ORIGIN_FILE = "origin.json"


class OriginFile(BaseModel):
    """Size and digest of one file, as the source gave them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nbytes: int
    digest: str


class Origin(BaseModel):
    """Where an adapter came from.

    Attributes:
        digest, name: the key.
        source, location, revision: the ref under which it was first fetched.
        files: by name.
        fetched: when, in seconds since 1970.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    digest: str
    name: str
    source: str
    location: str
    revision: str | None
    files: dict[str, OriginFile]
    fetched: float

    @property
    def key(self) -> AdapterKey:
        return AdapterKey(self.digest, self.name)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    @property
    def remote_files(self) -> tuple[RemoteFile, ...]:
        return tuple(RemoteFile(n, f.nbytes, f.digest) for n, f in self.files.items())

    def write(self, directory: Path) -> None:
        """Write it into `directory`, at once."""
        new = directory / f"{ORIGIN_FILE}.new"
        new.write_text(self.model_dump_json(indent=1) + "\n")
        os.replace(new, directory / ORIGIN_FILE)

    @classmethod
    def read(cls, directory: Path) -> Origin:
        """Read it.

        Raises:
            InvalidAdapterError: it is missing or malformed: this was not published by a store.
        """
        try:
            return cls.model_validate(json.loads((directory / ORIGIN_FILE).read_bytes()))
        except (OSError, ValueError, ValidationError) as error:
            raise InvalidAdapterError(f"{directory} has no readable {ORIGIN_FILE}") from error
