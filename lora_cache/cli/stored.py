"""What the store says of its adapters, as the commands print it."""

from __future__ import annotations

from typing import Any

from lora_cache.errors import AdapterError
from lora_cache.manifest import read_manifest
from lora_cache.store import Entry
from lora_cache.store.origin import Origin


def describe(entry: Entry) -> dict[str, Any]:
    """One adapter, as JSON; what cannot be read of it is in ``error``."""
    row = entry.row
    described = {
        "name": row.name,
        "key": row.digest or None,
        "path": str(entry.path),
        "bytes": row.nbytes,
        "complete": not row.partial,
        "in_use": entry.in_use,
        "created": row.created,
        "last_used": row.used,
        "uses": row.uses,
        "source": None,
        "location": None,
        "revision": None,
        "rank": None,
        "error": None,
    }
    if row.partial:
        return described
    try:
        origin, manifest = Origin.read(entry.path), read_manifest(entry.path)
    except AdapterError as error:
        return {**described, "error": str(error)}
    return {
        **described,
        "source": origin.source,
        "location": origin.location,
        "revision": origin.revision,
        "rank": manifest.rank,
    }


def where_from(row: dict[str, Any]) -> str:
    """A ref, as it is written."""
    if row["location"] is None:
        return ""
    scheme = "" if row["source"] == "hub" else f"{row['source']}://"
    return f"{scheme}{row['location']}" + (f"@{row['revision']}" if row["revision"] else "")


def short_key(digest: str | None) -> str:
    """The beginning of a commit or a digest: enough to tell two apart."""
    return (digest or "").rpartition("@")[2].rpartition(":")[2][:12]
