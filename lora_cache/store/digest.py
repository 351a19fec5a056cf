"""Digests of files, as sources give them: ``"sha256:…"``, ``"git-sha1:…"``."""

from __future__ import annotations

import hashlib
from typing import Any


def new_digest(promised: str, nbytes: int) -> Any:
    """A hash of the kind of `promised`, for a file of `nbytes`; feed it the file."""
    if promised.startswith("git-sha1:"):
        made = hashlib.sha1(usedforsecurity=False)
        made.update(b"blob %d\x00" % nbytes)  # git hashes its header, too
        return made
    return hashlib.sha256()


def is_promised(promised: str, made: Any) -> bool:
    """Whether the hash `made` came out as `promised`."""
    return bool(made.hexdigest() == promised.rpartition(":")[2])
