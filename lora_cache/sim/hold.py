"""How long a request keeps its adapter in use."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_cache.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hold:
    """A lease lasts `fixed_s` seconds, and `per_token_s` for each generated token."""

    fixed_s: float = 0.0
    per_token_s: float = 0.0

    def seconds(self, output_tokens: int) -> float:
        """How long the lease of a request lasts, once granted."""
        return self.fixed_s + self.per_token_s * output_tokens

    def __str__(self) -> str:
        return f"{self.per_token_s}/token" if self.per_token_s else str(self.fixed_s)


def parse_hold(text: str) -> Hold | None:
    """Read ``none`` (None: leases end at once), ``2.5`` (seconds) or ``0.02/token``.

    Raises:
        ConfigError: it is none of these.
    """
    if text == "none":
        return None
    number, slash, unit = (part.strip() for part in text.partition("/"))
    try:
        seconds = float(number)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf or (slash and unit != "token"):
        raise ConfigError(
            f"hold is {text!r}: write none, seconds (2.5), or seconds per token (0.02/token)"
        )
    return Hold(per_token_s=seconds) if slash else Hold(fixed_s=seconds)
