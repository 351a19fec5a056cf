"""`LLM`: what `vllm.LLM` is, with any number of adapters over the slots.

vLLM's own class does everything but two things: a request that it would hand to its engine is
kept back (`_add_request`), and the loop that steps the engine (`_run_engine`) is the cache's.
There, every prompt waits for a lease of its adapter; all prompts of one adapter get theirs
together, and as soon as an adapter's last prompt is done, the next one comes into its slot, while
the others decode.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import vllm
import vllm.exceptions
import vllm.platforms
from vllm.sampling_params import RequestOutputKind

from lora_cache.adapter import AdapterLike, AdapterRef, as_ref, several
from lora_cache.cache import AsyncLoraCache
from lora_cache.catalog import Catalog
from lora_cache.config import CacheConfig, CacheSettings
from lora_cache.engines import SWITCH, is_switched_on
from lora_cache.errors import ConfigError, LoraCacheError, RequestRefusedError
from lora_cache.plan.slots import MAX_LORA_RANKS
from lora_cache.setup import disk_tier
from lora_cache.sources import Source, default_sources
from lora_cache.views import Snapshot, Stats

DEFAULT_MAX_RANK = 64
DEFAULT_MAX_LORAS = 8

#: 0.26 raises a ValueError of its own, later versions something with a base of its own.
_REFUSALS = (
    ValueError,
    TypeError,
    getattr(vllm.exceptions, "VLLMError", vllm.exceptions.VLLMValidationError),
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that was rendered and not run yet."""

    request_id: str
    prompt: Any
    params: Any
    adapter: AdapterRef | None
    priority: int


class LLM(vllm.LLM):  # type: ignore[misc]  # vLLM is checked without its types
    """`vllm.LLM` for scripts and notebooks, where ``lora_request`` is any adapter you can name.

    ```python
    llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
    llm.generate("Hello", lora_request="adapters/pirate")
    llm.chat(conversations, lora_request=["acme/sql-lora", None, ...])  # one per prompt
    ```

    ``lora_request`` takes a path, ``org/name[@revision]``, an `AdapterRef`, a vLLM
    ``LoRARequest`` (its path counts), None, or a list with one of these per prompt.

    Args:
        model: as for vLLM.
        adapters: adapters that will be used, if they are known: `max_lora_rank` is then the rank
            of the largest, instead of 64, which admits most adapters (a slot costs memory in
            proportion: 5 MB a rank on an 8B model).
        max_loras: GPU slots; 8 if not given.
        max_cpu_loras: adapters in host memory and one place to load into; 4 × `max_loras` + 1.
        sources: as for `AsyncLoraCache`, e.g. a `HubSource` for some organisations only.
        options: settings of the cache (`CacheConfig`) and arguments of vLLM.  `publish` and
            `memory_pressure` are off, if not given.

    Raises:
        ConfigError: the settings contradict each other.
        AdapterError: one of `adapters` cannot be served.

    Like `vllm.LLM`, not thread-safe: everything happens on the caller's thread.
    """

    def __init__(
        self,
        model: str,
        *,
        adapters: AdapterLike | Iterable[AdapterLike] = (),
        max_loras: int = DEFAULT_MAX_LORAS,
        max_cpu_loras: int | None = None,
        max_lora_rank: int | None = None,
        sources: dict[str, Source] | None = None,
        **options: Any,
    ) -> None:
        settings = {k: options.pop(k) for k in list(options) if k in CacheConfig.model_fields}
        settings.setdefault("publish", False)
        settings.setdefault("memory_pressure", False)  # its loop runs only while it generates
        # Before the engine is started for nothing:
        config = CacheConfig.of(cast(CacheSettings, settings))
        if options.setdefault("enable_lora", True) is not True:
            raise ConfigError("enable_lora=False leaves nothing to manage: use vllm.LLM")
        if config.engine == "resident" and not is_switched_on():
            os.environ[SWITCH] = "1"  # vLLM's processes look there when they start
        self._runner = asyncio.Runner()
        weakref.finalize(self, self._runner.close)
        super().__init__(
            model,
            max_loras=max_loras,
            max_cpu_loras=4 * max_loras + 1 if max_cpu_loras is None else max_cpu_loras,
            max_lora_rank=max_lora_rank or self._run(_rank_for(adapters, config, sources)),
            **options,
        )
        self._pending: list[_Request] = []
        self.cache = AsyncLoraCache(self, sources=sources, **settings)
        self._run(self.cache.__aenter__())

    # ------------------------------------------------------------------ vllm.LLM, and more

    def generate(self, prompts: Any, *args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        """As `vllm.LLM.generate`; outputs come in the order of the prompts.

        Raises:
            AdapterError: an adapter is missing or cannot be served; nothing was run.
            LoadFailedError: vLLM could not load one; the other requests were aborted.
            RequestRefusedError: vLLM refuses a prompt or its parameters; nothing was run.
        """
        with _refusals():
            return super().generate(prompts, *args, lora_request=_named(lora_request), **kwargs)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,  # vLLM takes it by position, too
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `vllm.LLM.chat`; see `generate`."""
        with _refusals():
            named = _named(lora_request)
            return super().chat(messages, sampling_params, use_tqdm, named, *args, **kwargs)

    def stats(self) -> Stats:
        """Counts since the start: hits by tier, evictions, loads."""
        return self.cache.stats()

    def snapshot(self) -> Snapshot:
        """Who is where."""
        return self.cache.snapshot()

    def prefetch(self, adapter: AdapterLike) -> None:
        """Bring an adapter into host memory, if that disturbs nobody."""
        self._run(self.cache.prefetch(adapter))

    def pin(self, adapter: AdapterLike) -> None:
        """Keep an adapter in a slot.  See `AsyncLoraCache.pin`."""
        self._run(self.cache.pin(adapter))

    def unpin(self, adapter: AdapterLike) -> None:
        """Let an adapter go again."""
        self._run(self.cache.unpin(adapter))

    def unload(self, adapter: AdapterLike) -> None:
        """Drop an adapter from GPU and host memory."""
        self._run(self.cache.unload(adapter))

    def reconcile(self) -> int:
        """Compare with what vLLM holds, and repair.  Returns how many copies were off."""
        return self._run(self.cache.reconcile())

    # ------------------------------------------------------------------ what vLLM calls

    def _add_request(
        self, prompt: Any, params: Any, lora_request: Any = None, priority: int = 0
    ) -> str:
        if hasattr(params, "output_kind"):
            params.output_kind = RequestOutputKind.FINAL_ONLY
        request_id = str(next(self.request_counter))
        self._pending.append(_Request(request_id, prompt, params, lora_request, priority))
        return request_id

    def _run_engine(
        self, output_type: Any = None, *, use_tqdm: bool | Callable[..., Any] = True
    ) -> list[Any]:
        pending, self._pending = self._pending, []
        return self._run(self._run_batch(pending, use_tqdm))

    def _render_and_add_requests(self, *args: Any, **kwargs: Any) -> Any:
        before = list(self._pending)
        try:
            return super()._render_and_add_requests(*args, **kwargs)
        except BaseException:  # Ctrl-C while rendering, too
            self._pending = before  # a prompt that vLLM refuses leaves no others behind
            raise

    async def _run_batch(
        self, requests: Sequence[_Request], use_tqdm: bool | Callable[..., Any]
    ) -> list[Any]:
        # Every adapter is read and validated before anything runs.
        for ref in dict.fromkeys(r.adapter for r in requests if r.adapter is not None):
            await self.cache.prefetch(ref, tier="disk")
        with _progress(len(requests), use_tqdm) as advance:

            async def one(request: _Request) -> Any:
                outputs = self.cache.generate(
                    request.prompt,
                    request.params,
                    request.adapter,
                    request_id=request.request_id,
                    priority=request.priority,
                )
                *_, last = [output async for output in outputs]
                advance()
                return last

            outputs: dict[str, Any] = {}
            for group in _batches(requests):
                tasks = [asyncio.ensure_future(one(request)) for request in group]
                try:
                    for output in await asyncio.gather(*tasks):
                        outputs[output.request_id] = output
                finally:  # one failed, or the caller pressed Ctrl-C: abort the others
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
            return [outputs[request.request_id] for request in requests]

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run on our own loop, on this thread.

        `asyncio.Runner` turns Ctrl-C into a cancellation, so no step of vLLM is torn in two.
        """
        # A notebook's own loop is running already; it waits for us, as for any call.
        running = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            return self._runner.run(coroutine)
        finally:
            asyncio._set_running_loop(running)


async def _rank_for(
    adapters: AdapterLike | Iterable[AdapterLike],
    config: CacheConfig,
    sources: dict[str, Source] | None = None,
) -> int:
    """The smallest rank of vLLM's that admits all of `adapters`, which are fetched for it."""
    refs = list(map(as_ref, several(adapters)))
    disk = disk_tier(config)
    catalog = Catalog(default_sources() | (sources or {}), disk)
    try:
        found = await asyncio.gather(*map(catalog.resolve, refs))
    finally:
        await disk.close()
    if not found:
        return DEFAULT_MAX_RANK
    largest = max(adapter.manifest.rank for adapter in found)
    return next((rank for rank in MAX_LORA_RANKS if rank >= largest), largest)


def _named(lora_request: Any) -> Any:
    """Refs for whatever ``lora_request`` may be: one for all prompts, or a list."""
    if lora_request is None or isinstance(lora_request, AdapterRef):
        return lora_request
    if isinstance(lora_request, str | os.PathLike):
        return AdapterRef.parse(lora_request)
    if isinstance(lora_request, Sequence):
        return [_named(each) for each in lora_request]
    if isinstance(path := getattr(lora_request, "lora_path", None), str):
        return AdapterRef.parse(path)
    raise ConfigError(
        f"lora_request is a {type(lora_request).__name__}: give a path, org/name[@revision], an "
        "AdapterRef, a LoRARequest, None, or a list with one of these per prompt"
    )


@contextmanager
def _refusals() -> Iterator[None]:
    """VLLM checks prompts and parameters itself, and raises errors of its own and Python's."""
    try:
        yield
    except _REFUSALS as error:
        if isinstance(error, LoraCacheError):
            raise
        raise RequestRefusedError(f"vLLM refused the request: {error}") from error


def _batches(requests: Sequence[_Request]) -> list[list[_Request]]:
    """All at once, but for vLLM's CPU build.

    There, base rows in a batch with adapter rows get an adapter's weights (its torch kernels wrap
    the index -1; vLLM PR #48421), so the base model's prompts are run by themselves.
    """
    if not vllm.platforms.current_platform.is_cpu():
        return [list(requests)]
    base = [request for request in requests if request.adapter is None]
    adapted = [request for request in requests if request.adapter is not None]
    return [group for group in (base, adapted) if group]


@contextmanager
def _progress(total: int, use_tqdm: bool | Callable[..., Any]) -> Iterator[Callable[[], None]]:
    """VLLM's progress bar: yields what is to be called when a request is done."""
    if not use_tqdm:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    bar = (use_tqdm if callable(use_tqdm) else tqdm)(total=total, desc="Processed prompts")
    try:
        yield lambda: bar.update(1)
    finally:
        bar.close()
