"""Rank and scaling of each module, from `adapter_config.json`, by vLLM's rules.

The rules are those of ``PEFTHelper`` (vLLM 0.32, ``lora/peft_helper.py``).  What vLLM would refuse
is refused here too, so that it is vLLM that says why.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from lora_cache.errors import CannotPackError, InvalidAdapterError, LoraCacheError
from lora_cache.manifest import CONFIG_FILE, check_config

# Patterns are regular expressions, and vLLM's engine is not Python's: plain names mean the same
# to both ("." matches any character in both).
_PLAIN_PATTERN = re.compile(r"[A-Za-z0-9_.]+")


class PeftConfig(msgspec.Struct, frozen=True):
    """What of `adapter_config.json` decides how weights are scaled."""

    r: int
    lora_alpha: float
    target_modules: Any  # required by vLLM, and not read by it
    use_rslora: bool | None = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None

    @property
    def has_patterns(self) -> bool:
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def largest_rank(self) -> int:
        return max([self.r, *(self.rank_pattern or {}).values()])

    def scaling(self, peft_module: str) -> float:
        """What ``B`` of this module is multiplied by.

        alpha / rank, or alpha / √rank with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
        """
        rank = int(_match(self.rank_pattern, peft_module, self.r))
        alpha = float(_match(self.alpha_pattern, peft_module, self.lora_alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_peft_config(directory: Path) -> PeftConfig:
    """Read it, and check that nothing in it is beyond the packer.

    Raises:
        InvalidAdapterError: it cannot be read.
        CannotPackError: it asks for what the packer, or vLLM, does not do.
    """
    path = directory / CONFIG_FILE
    try:
        check_config(directory)
        config = msgspec.json.decode(path.read_bytes(), type=PeftConfig)
    except LoraCacheError as error:
        raise CannotPackError(str(error)) from error
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidAdapterError(f"{path} cannot be read: {error}") from error
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if min(ranks) <= 0:
        raise CannotPackError(f"{path}: a rank of {min(ranks)} is none")
    if config.modules_to_save:
        raise CannotPackError(f"{path}: modules_to_save holds whole modules, not LoRA")
    for pattern in {**(config.rank_pattern or {}), **(config.alpha_pattern or {})}:
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise CannotPackError(f"{path}: pattern {pattern!r} is more than a name")
    return config


def _match(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """A pattern matches the end of a name, from a dot on; the first one that does, counts."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
