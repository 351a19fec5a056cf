"""vLLM's entry point into the resident engine (``vllm.general_plugins``).

vLLM calls `register` in every process that it starts, whether the resident engine is wanted or not.
Without ``LORA_CACHE_RESIDENT=1`` in the environment that does nothing.  With it, vLLM's worker-side
LoRA manager is replaced as soon as the module that uses it is imported: only workers do, so no
other process pays for importing torch.  ``LORA_CACHE_RESIDENT=force`` does so in versions of vLLM,
too, that it was never run with.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from lora_cache.engines import FORCE, SWITCH, is_switched_on
from lora_cache.engines.resident import compat

logger = logging.getLogger(__name__)


def register() -> None:
    """Switch the resident engine on in this process, if the environment says so.

    May be called any number of times.  Never raises: a vLLM with which it was never run stays as
    it is, unless forced.
    """
    if not is_switched_on():
        return
    if reason := compat.never_run():
        if os.environ[SWITCH] != FORCE:
            logger.error(
                "the resident engine stays off: %s; %s=%s would use it all the same",
                reason, SWITCH, FORCE,
            )  # fmt: skip
            return
        logger.warning("the resident engine is on by force: %s", reason)
    loaded = sys.modules.get(compat.MIXIN_MODULE)
    if loaded is not None:
        compat.take_over(loaded)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the import of one module, and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != compat.MIXIN_MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads as the real loader does, then takes over."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        compat.take_over(module)
