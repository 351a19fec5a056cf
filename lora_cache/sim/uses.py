"""From the requests of a trace to what a planner is asked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from operator import itemgetter

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.sim.trace import Request, Trace

#: One request, as a planner sees it: time in seconds, adapter, its bytes, tokens generated.
#: A plain tuple, because it is taken apart for every request and every policy.
Use = tuple[float, AdapterKey, int, int]

_BATCH = 1024
_OF_USE = itemgetter(*map(Request._fields.index, ("time_s", "adapter", "nbytes", "output_tokens")))


class _Key(AdapterKey):
    """Made once for each adapter of a trace: the same key is the same object.

    Every request is looked up some thirty times, and this is hashed without a call into Python.
    """

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Keys(dict[str, AdapterKey]):
    """The key of each adapter of a trace, by name; made when it is first asked for."""

    def __missing__(self, name: str) -> AdapterKey:
        key = self[name] = _Key(f"trace:{name}", name)
        return key


def batches(trace: Trace, keys: Keys, nbytes: int, most: int | None) -> Iterator[list[Use]]:
    """The requests of `trace`, as planners see them, some at a time.

    Args:
        nbytes: of an adapter whose size the trace does not tell.
        most: bytes that an adapter may have, or None.

    Raises:
        ConfigError: the trace is malformed, or an adapter is too large.
    """
    stream = iter(trace)
    while batch := list(map(_OF_USE, islice(stream, _BATCH))):
        uses = [
            (time_s, keys[name], nbytes if size is None else size, output_tokens)
            for time_s, name, size, output_tokens in batch
        ]
        if most is not None:
            for _, key, size, _ in uses:
                if size > most:
                    raise ConfigError(
                        f"{trace.name}: adapter {key.name} has {size} bytes, and host memory "
                        f"has {most}: it needs more"
                    )
        yield uses
