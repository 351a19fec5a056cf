"""What a user writes where a trace is expected: a file, or a spec of synthetic traffic."""

from __future__ import annotations

import re

from lora_cache.sim.trace import FileTrace, Trace

_SPEC = re.compile(r"^[a-z_]+(:[a-z_]+=.*)?$")


def open_trace(text: str, seed: int = 0) -> Trace:
    """Find the trace that `text` names: a path, or a spec like ``zipf:adapters=1000,skew=1.0``.

    Args:
        seed: of synthetic traffic whose spec gives none.

    Raises:
        ConfigError: it is neither, or a setting in the spec is refused.
    """
    if not _SPEC.fullmatch(text):
        return FileTrace(text)
    from lora_cache.sim.generators import SyntheticTrace  # numpy: only where it is needed

    return SyntheticTrace(text, seed)
