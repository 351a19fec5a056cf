"""What a trace says of the load: how many adapters, how often, and how much context at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lora_cache.errors import ConfigError
from lora_cache.plan.ranks import Ranks
from lora_cache.sim import Hold, Trace


@dataclass(frozen=True, slots=True)
class Traffic:
    """A trace in a few numbers.

    Attributes:
        name: what the user wrote to name it.
        requests: how many there are, for so many `adapters`.
        rate: requests per second on average; 0 where all come at once.
        tokens_in_flight: context of all requests that run at a time, on average: each counts
            with all its tokens for as long as it holds its adapter (Little's law).
        longest: tokens of the longest request.
        long_prompt: one prompt in ten has as many tokens, or more.
        ranks: of the adapters, where the trace tells them; else None.
    """

    name: str
    requests: int
    adapters: int
    rate: float
    tokens_in_flight: float
    longest: int
    long_prompt: int
    ranks: Ranks | None

    @classmethod
    def of(cls, trace: Trace, hold: Hold | None) -> Traffic:
        """Read the trace once.

        Raises:
            ConfigError: it is malformed, or empty.
        """
        rank_of: dict[str, int] = {}
        prompts: Counter[int] = Counter()
        requests, longest, token_seconds = 0, 0, 0.0
        first_s = last_s = 0.0
        for request in trace:
            first_s = request.time_s if not requests else first_s
            last_s = request.time_s
            requests += 1
            rank_of[request.adapter] = request.rank or rank_of.get(request.adapter, 0)
            tokens = request.input_tokens + request.output_tokens
            longest = max(longest, tokens)
            prompts[request.input_tokens] += 1
            if hold is not None:
                token_seconds += tokens * hold.seconds(request.output_tokens)
        if not requests:
            raise ConfigError(f"{trace.name} holds no requests")
        duration_s = last_s - first_s
        known = [rank for rank in rank_of.values() if rank]
        return cls(
            name=trace.name,
            requests=requests,
            adapters=len(rank_of),
            rate=requests / duration_s if duration_s > 0 else 0.0,
            tokens_in_flight=token_seconds / duration_s if duration_s > 0 else 0.0,
            longest=longest,
            long_prompt=_longest_tenth(prompts),
            ranks=Ranks.of(known) if known else None,
        )


def _longest_tenth(prompts: Counter[int]) -> int:
    """Where the longest tenth begins.

    Args:
        prompts: how many have so many tokens.
    """
    seen, enough = 0, prompts.total() / 10
    for tokens in sorted(prompts, reverse=True):
        seen += prompts[tokens]
        if seen >= enough:
            return tokens
    return 0
