"""What the serving measurements share: a model and adapters, vLLM behind `AsyncLLM`, records.

One vLLM serves all rows of a measurement.  It is started with the resident engine switched on,
which changes nothing until a cache attaches: so plain vLLM, vLLM under our planner (the stock
engine) and the resident engine are measured on the same process, one after the other.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lora_cache.bench.servers import Row
from lora_cache.bench.vllm import prompt as random_prompt
from lora_cache.bench.vllm import start_vllm as start

#: Of an adapter of all linear layers of Llama-3.1-8B in bfloat16, for each of its rank.
RANK_BYTES = 5_242_880

_BEGAN = time.perf_counter()
_SHM = Path("/dev/shm")
_SPARE_BYTES = 4 << 30


def register_plugin(root: Path) -> None:
    """Let vLLM's processes find the entry point where the package is not installed."""
    if any(e.name == "lora_cache" for e in entry_points(group="vllm.general_plugins")):
        return
    info = root / "site" / "lora_cache-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-cache\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nlora_cache = lora_cache.engines.resident.plugin:register\n"
    )
    sys.path.append(str(info.parent))
    here = str(Path(__file__).parents[2])
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, known, str(info.parent)]))


def roomy(nbytes: int, held: int) -> Path:
    """A directory with room for files: in memory if that is plentiful, else the temporary one.

    Args:
        nbytes: of the files.
        held: of those that may be in host memory; vLLM and the cache each have such copies.

    Raises:
        SystemExit: neither has room.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = nbytes + 2 * held + 4 * _SPARE_BYTES
    if _SHM.is_dir() and _free(_SHM) > nbytes and memory > enough:
        return _SHM
    if _free(directory := Path(tempfile.gettempdir())) > nbytes + _SPARE_BYTES:
        return directory
    raise SystemExit(f"no room for {nbytes / 1e9:.0f} GB in {_SHM} or {directory}: give --files")


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def _write(directory: Path, index: int, rank: int, tiny: bool) -> Path:
    import torch

    from benchmarks.gpu.spike_scatter import files

    torch.set_num_threads(1)
    _, made = files(directory / f"part-{index:05d}", 1, tiny, rank=rank, seed=index)
    return made[0]


def write_files(
    root: Path, number: int, *, rank: int | Sequence[int] = 16, tiny: bool = False
) -> tuple[Path, list[Path]]:
    """A model, and adapters of distinct bytes for it, written by all cores.

    Args:
        rank: of all adapters, or of each.
    """
    from benchmarks.gpu.spike_scatter import files

    model, _ = files(root / "base", 0, tiny)
    ranks = [rank] * number if isinstance(rank, int) else rank
    with ProcessPoolExecutor() as pool:
        parts = [
            pool.submit(_write, root / "adapters", index, rank, tiny)
            for index, rank in enumerate(ranks)
        ]
        return model, [part.result() for part in parts]


def uncache(adapters: Sequence[Path]) -> float:
    """Have the system forget the files of adapters: who reads them next reads the disk.

    Returns:
        The share of their pages that are still in memory: those that somebody has mapped.

    Raises:
        SystemExit: most are, as the directory is in memory.
    """
    pages = cached = 0
    for path in (file for adapter in adapters for file in adapter.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
                found = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
                first = ctypes.c_char.from_buffer(view)
                ctypes.CDLL(None).mincore(
                    ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(view)), found
                )
                del first  # or the map cannot be closed
        pages += len(found)
        cached += sum(page & 1 for page in found)
    if 2 * cached > pages:
        raise SystemExit(f"{adapters[0].parent} is in memory: give --files, a directory on a disk")
    return cached / pages


def use_kernels(folder: Path | None) -> None:
    """Have vLLM launch its LoRA kernels as `benchmarks.gpu.lora_kernels` found best."""
    if folder is not None:
        os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(folder.resolve())


def start_vllm(
    model: Path,
    *,
    slots: int,
    host: int,
    max_num_seqs: int,
    rank: int = 16,
    max_model_len: int = 2048,
    graph_tokens: int | None = None,
    tiny: bool = False,
) -> Any:
    """An `AsyncLLM`; a tiny one runs on a CPU."""
    return start(
        model,
        slots=slots,
        host=host,
        rank=rank,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        kv_bytes=64 << 20 if tiny else 16 << 30,
        on_cpu=tiny,
        graph_tokens=graph_tokens,
    )


def prompt(rng: random.Random, length: int, tiny: bool) -> Any:
    return random_prompt(rng, length, 400 if tiny else 100_000)


class Record:
    """The rows of a measurement: each is printed and saved at once, for a run may be cut off.

    Args:
        options: of the command, whose `json` says where to; None: nowhere.
        facts: that are saved beside the rows.
    """

    def __init__(self, options: argparse.Namespace, **facts: Any) -> None:
        self.path: Path | None = options.json
        self.options = {name: value for name, value in vars(options).items() if name != "json"}
        self.facts = facts
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.save()

    def save(self) -> None:
        if self.path:
            raw = about() | self.facts | {"options": self.options, "rows": self.rows}
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(raw, indent=1, default=str) + "\n")
            part.replace(self.path)


def left_s(until: float | None) -> float:
    """Seconds until the program has run for `until` seconds; without a limit if that is None."""
    return float("inf") if until is None else until - (time.perf_counter() - _BEGAN)


def stop_politely() -> None:
    """Have a measurement that is told to end stop its engine and print its table first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def about() -> Row:
    """The machine and the versions.  Asked once an engine runs: it decides how vLLM is imported."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    return {
        "command": " ".join(["python3 -m", _module(), *sys.argv[1:]]),
        "device": current_platform.get_device_name(),  # unlike PyTorch, takes no GPU memory
        "cores": os.cpu_count(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
