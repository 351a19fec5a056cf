"""What lies in the repositories: adapters of any size, and what else people upload with them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

#: Contents by path within the repository.
Files = Mapping[str, bytes]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("q_proj", "v_proj")

#: (up to bytes, rank, hidden size): modules of 2 kB, of 32 kB, of 1 MB.
SHAPES = ((256_000, 8, 64), (8_000_000, 8, 1024), (1 << 62, 64, 4096))


def adapter_files(
    nbytes: int = 10_000, *, seed: int = 0, config: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """A LoRA of about `nbytes` (to one module), in float16, with weights that no other seed has.

    It is valid, but fits no model; `files_of(write_adapter(…))` gives one that fits the tiny one.
    """
    rank, hidden = next((rank, hidden) for limit, rank, hidden in SHAPES if nbytes <= limit)
    module_nbytes = 2 * rank * hidden * 2
    rng = np.random.default_rng(seed)
    tensors = {}
    for number in range(max(len(TARGETS), nbytes // module_nbytes)):
        layer, target = divmod(number, len(TARGETS))
        name = f"base_model.model.model.layers.{layer}.self_attn.{TARGETS[target]}"
        tensors[f"{name}.lora_A.weight"] = _random(rng, rank, hidden)
        tensors[f"{name}.lora_B.weight"] = _random(rng, hidden, rank)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(TARGETS),
        "base_model_name_or_path": "tiny",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        **(config or {}),
    }
    return {CONFIG: json.dumps(settings, indent=2).encode(), WEIGHTS: save(tensors)}


def _random(rng: np.random.Generator, rows: int, columns: int) -> Any:
    # Random bits are much faster than random numbers; without the exponent's highest bit they are
    # all finite and below 2.
    bits = np.frombuffer(rng.bytes(rows * columns * 2), np.uint16) & np.uint16(0xBFFF)
    return bits.view(np.float16).reshape(rows, columns)


def files_of(directory: Path) -> dict[str, bytes]:
    """All files under a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class _NeverUnpickle:
    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("this file must never be unpickled",)


def clutter(seed: int = 0) -> dict[str, bytes]:
    """Files beside an adapter that must never be downloaded; the pickles fail to load."""
    rng = np.random.default_rng(seed)
    bomb = pickle.dumps(_NeverUnpickle())
    inner = adapter_files(seed=seed + 1)
    return {
        ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": b"---\nbase_model: tiny\nlibrary_name: peft\n---\n# An adapter\n",
        "adapter_model.bin": bomb + rng.bytes(20_000),
        "optimizer.pt": bomb + rng.bytes(50_000),
        "train.py": b'raise RuntimeError("code of a repository must never run")\n',
        "checkpoint-10/optimizer.pt": bomb + rng.bytes(5_000),
        **{f"checkpoint-10/{path}": content for path, content in inner.items()},
    }
