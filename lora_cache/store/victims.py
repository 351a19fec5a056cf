"""Who leaves the store first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_cache.key import AdapterKey
from lora_cache.policies import PolicyLike, make_policy
from lora_cache.store.index import Row

_MAX_REPLAYED = 64  # uses of one adapter that a policy is told of


def victims(policy: PolicyLike, rows: Sequence[Row]) -> Iterator[Row]:
    """Fetches that broke off, then as a fresh policy says that was told of all uses.

    Args:
        rows: by last use.
    """
    yield from (row for row in rows if row.partial)
    asked = make_policy(policy)
    whole = {AdapterKey(row.folder): row for row in rows if not row.partial}
    for key, row in whole.items():
        asked.on_insert(key, row.nbytes, float(row.nbytes), row.used)
        for _ in range(min(row.uses, _MAX_REPLAYED)):
            asked.on_access(key, row.used)
    for key in asked.rank_victims(rows[-1].used if rows else 0.0):
        yield whole[key]
