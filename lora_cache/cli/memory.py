"""``lora-cache status --memory``: what a cache says it holds, against what the system reports.

The system has the last word, and the difference is shown: what neither slots nor weights explain is
what vLLM needs to work, and the CUDA context; what host memory has beside adapters is programs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.text import Text

from lora_cache.cli.output import human_bytes, one_line, plural
from lora_cache.memory import GpuMemory, GpuReading, Gpus, Host
from lora_cache.memory.family import FamilyMemory, family_memory

_CLAIMED = ("weights", "slots", "kv_cache", "staging")


def account(cache: dict[str, Any], gpus: GpuReading) -> dict[str, Any]:
    """The books of one cache, as JSON."""
    held = family_memory(cache["pid"])
    claims = cache.get("claims") or {"unknown": "this engine says nothing of its memory"}
    mine = [gpu for gpu in gpus.gpus if _used_by(gpu, held) is not None]
    return {
        "claims": claims,
        "gpus": [_gpu(gpu, held, claims) for gpu in mine],
        "gpus_unknown": gpus.unknown or _invisible(gpus, mine),
        "host": _host(cache, held),
    }


def read_gpus() -> GpuReading:
    """Every GPU of this machine, whichever this command may use."""
    # What is unknown is printed; it need not be on stderr, too.
    logging.getLogger("lora_cache.memory").addHandler(logging.NullHandler())
    return Gpus(environ={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).read()


def _gpu(gpu: GpuMemory, held: FamilyMemory, claims: dict[str, Any]) -> dict[str, Any]:
    used = _used_by(gpu, held)
    parts = [claims.get(name) for name in _CLAIMED]
    known = sum(part for part in parts if part)
    whole = None not in parts
    return {
        **{name: getattr(gpu, name) for name in ("index", "uuid", "name", "total", "used", "free")},
        "used_by_cache": used,
        "claimed": known if whole else None,
        "difference": used - known if whole and used is not None else None,
    }


def _used_by(gpu: GpuMemory, held: FamilyMemory) -> int | None:
    """Bytes that these processes have of a GPU; None if they have none, or it is not known."""
    shares = [p.used for p in gpu.processes or () if p.pid in held.pids]
    return sum(share or 0 for share in shares) if shares else None


def _invisible(gpus: GpuReading, mine: list[GpuMemory]) -> str | None:
    if mine:
        return None
    if reasons := {gpu.unknown for gpu in gpus.gpus if gpu.unknown}:
        return ", ".join(sorted(reasons))
    # In a container NVML counts processes as the machine does, and we as the container does.
    return "none of its processes is among those that NVML lists"


def _host(cache: dict[str, Any], held: FamilyMemory) -> dict[str, Any]:
    charged = cache["snapshot"]["host_bytes"]
    adapters = charged if held.arena is None else held.arena
    memory = Host().read()
    return {
        **(asdict(memory) if memory else {"total": None, "available": None, "limited_by": None}),
        **asdict(held),
        "pids": list(held.pids),
        "charged": charged,
        "difference": held.private + held.shared - adapters,
    }


def show(books: dict[str, Any]) -> Iterator[Text]:
    """The same for people."""
    yield from _show_gpus(books)
    yield from _show_host(books["host"])


def _show_gpus(books: dict[str, Any]) -> Iterator[Text]:
    claims = books["claims"]
    if claims.get("unknown"):
        yield _line(f"what it holds on GPUs is unknown: {claims['unknown']}")
    else:
        about = "about " if claims["is_estimate"] else ""
        parts = [
            f"weights {about}{_size(claims['weights'])}",
            f"slots {_size(claims['slots'])} ({_size(claims['bytes_per_slot'])} each)",
            f"KV cache {_size(claims['kv_cache'])}",
        ]
        parts += [f"staging {_size(claims['staging'])}"] if claims["staging"] else []
        where = f"each of {claims['gpus']} GPUs" if claims["gpus"] > 1 else "the GPU"
        yield _line(f"on {where} it holds: {', '.join(parts)}")
    if books["gpus_unknown"]:
        yield _line(f"what GPUs report is unknown: {books['gpus_unknown']}")
    for gpu in books["gpus"]:
        rest = ""
        if gpu["difference"] is not None:
            rest = f": {_size(gpu['difference'])} more than that (to work, graphs, CUDA context)"
        yield _line(
            f"GPU {gpu['index']} {gpu['name']}: its processes have {_size(gpu['used_by_cache'])}"
            f"{rest}; {_size(gpu['free'])} of {_size(gpu['total'])} are free"
        )


def _show_host(host: dict[str, Any]) -> Iterator[Text]:
    arena = "" if host["arena"] is None else f", the arena takes {_size(host['arena'])}"
    yield _line(f"in host memory: adapters are charged {_size(host['charged'])}{arena}")
    processes = plural(len(host["pids"]), "process", "processes")
    yield _line(
        f"{processes}: {_size(host['private'])} of their own, {_size(host['shared'])} shared, "
        f"{_size(host['difference'])} more than adapters; page-locked "
        f"{_size(host['page_locked'])} (as far as the kernel counts), locked "
        f"{_size(host['locked'])}"
    )
    limit = "" if host["limited_by"] in (None, "machine") else f" (limit of {host['limited_by']})"
    yield _line(f"left for all: {_size(host['available'])} of {_size(host['total'])}{limit}")


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return "unknown"
    return f"−{human_bytes(-nbytes)}" if nbytes < 0 else human_bytes(nbytes)


def _line(text: str) -> Text:
    return Text(one_line(text))
