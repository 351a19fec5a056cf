"""What an adapter says of itself, read from `adapter_config.json` and the safetensors header.

Neither torch nor the weights are touched: only the header is read, whatever the file's size.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from lora_cache.errors import AdapterNotFoundError, InvalidAdapterError, UnsupportedAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)  #: what vLLM reads of an adapter

#: Device, inode, size, mtime and ctime (ns) of each of `FILES`.
Stamp = tuple[tuple[int, ...], ...]

_PICKLES = ("adapter_model.bin", "adapter_model.pt")
MAX_CONFIG_BYTES = 4 << 20

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1}


Rank = Annotated[int, Field(gt=0, le=65536)]

#: Initialisations after which an adapter is a plain LoRA (vLLM 0.32, `lora/peft_helper.py`).
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


class _PeftConfig(BaseModel):
    """The part of PEFT's `adapter_config.json` that decides how weights are read."""

    model_config = ConfigDict(extra="ignore", strict=True)

    peft_type: str = "LORA"
    r: Rank
    lora_alpha: float = Field(allow_inf_nan=False)
    target_modules: list[str] | str | None = None
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None

    # What changes the meaning of the weights, and vLLM does not implement.
    use_dora: bool | None = None
    lora_bias: bool | None = None
    bias: str | None = None
    modules_to_save: list[str] | None = None
    layer_replication: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: bool | None = None
    use_bdlora: Any = None
    init_lora_weights: bool | str | None = None

    def unsupported(self) -> str | None:
        """What vLLM would refuse, in words, or None."""
        if self.peft_type.upper() != "LORA":
            return f"peft_type is {self.peft_type!r}; only LORA adapters can be served"
        if self.use_dora:
            return "vLLM does not serve DoRA; merge it, or train with use_dora=False"
        if self.lora_bias or self.bias not in (None, "none"):
            return "vLLM does not serve biases; train with bias='none' and lora_bias=False"
        if unknown := set(self.modules_to_save or ()) - {"classifier", "score"}:
            return f"modules_to_save {sorted(unknown)} are whole layers, not LoRA; merge them"
        for name in ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"):
            if getattr(self, name):
                return f"vLLM does not serve adapters trained with {name}"
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
            return (
                f"init_lora_weights={init!r} changes the base model's weights; convert it with "
                "peft's path_initial_model_for_weight_conversion"
            )
        return None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Facts about one adapter.

    Attributes:
        rank: the largest rank in it (``rank_pattern`` included): what `max_lora_rank` must admit.
        alpha: ``lora_alpha``.
        scaling: what ``B·A`` is multiplied by: alpha / rank, or alpha / √rank with rsLoRA
            (Kalajdzievski 2023, arXiv:2312.03732).
        target_modules: module names that carry weights, sorted, e.g. ``("q_proj", "v_proj")``.
        widths: input and output width of each kind of module, sorted and distinct, e.g.
            ``(("q_proj", 4096, 4096), ("v_proj", 4096, 1024))``: what the base model must have.
        dtypes: safetensors dtypes of the weights, sorted, e.g. ``("BF16",)``.
        base_model: the model that it was trained on, if it says so.
        nbytes: bytes of all its tensors.
        tensor_count: number of its tensors.
    """

    rank: int
    alpha: float
    scaling: float
    target_modules: tuple[str, ...]
    widths: tuple[tuple[str, int, int], ...]
    dtypes: tuple[str, ...]
    base_model: str | None
    nbytes: int
    tensor_count: int


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of the adapter in `directory`.

    Raises:
        AdapterNotFoundError: the directory or one of its two files is missing.
        InvalidAdapterError: a file is malformed or truncated, or the weights are a pickle.
        UnsupportedAdapterError: it is not a LoRA, or of a kind that vLLM refuses (DoRA).
    """
    config = _read_config(directory)
    if reason := config.unsupported():
        raise UnsupportedAdapterError(f"{directory}: {reason}")
    shapes = _read_header(directory)
    dtypes = sorted({dtype for dtype, _ in shapes.values()})
    unknown = [dtype for dtype in dtypes if dtype not in _ITEM_BYTES]
    if unknown:
        raise UnsupportedAdapterError(
            f"{directory}: weights of dtype {', '.join(unknown)}; save them as bfloat16"
        )
    targets = _target_modules(shapes)
    if not targets:
        raise InvalidAdapterError(
            f"{directory / WEIGHTS_FILE} holds no LoRA weights (no lora_A, lora_B): give an "
            "adapter as peft's save_pretrained writes it"
        )
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    for name, (_, shape) in shapes.items():
        if ".lora_A." in name and (len(shape) != 2 or shape[0] > rank):
            raise InvalidAdapterError(
                f"{directory / WEIGHTS_FILE}: {name} has shape {shape}, and {CONFIG_FILE} says "
                f"rank {rank}: the two files do not belong together"
            )
    return Manifest(
        rank=rank,
        alpha=config.lora_alpha,
        scaling=config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r),
        target_modules=targets,
        widths=_widths(shapes),
        dtypes=tuple(dtypes),
        base_model=config.base_model_name_or_path,
        nbytes=sum(_ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in shapes.values()),
        tensor_count=len(shapes),
    )


def check_config(directory: Path) -> None:
    """Read `adapter_config.json` alone, and raise what `read_manifest` would raise for it."""
    if reason := _read_config(directory).unsupported():
        raise UnsupportedAdapterError(f"{directory}: {reason}")


def read_stamp(directory: Path) -> Stamp:
    """The identity of an adapter's files: equal stamps mean unchanged files, without reading.

    Raises:
        AdapterNotFoundError: a file is missing or out of reach.
    """
    try:
        stats = [os.stat(f"{directory}/{name}") for name in FILES]
    except OSError as error:
        raise AdapterNotFoundError(f"{directory}: {error.strerror}") from error
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)


def _read_config(directory: Path) -> _PeftConfig:
    path = directory / CONFIG_FILE
    try:
        if not path.is_file() and path.exists():
            raise InvalidAdapterError(f"{path} is not a regular file: copy the adapter again")
        with open(path, "rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise InvalidAdapterError(
                f"{path} is larger than any adapter's configuration: copy the adapter again"
            )
        return _PeftConfig.model_validate(json.loads(text))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"has no {CONFIG_FILE}" if directory.is_dir() else "is not a directory"
        raise AdapterNotFoundError(
            f"{directory} {what}: give the directory that peft's save_pretrained wrote"
        ) from error
    except OSError as error:
        raise InvalidAdapterError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidAdapterError(f"{path}: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"{path} is not valid JSON: {error}") from error


def _read_header(directory: Path) -> dict[str, tuple[str, list[int]]]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickle = next((name for name in _PICKLES if (directory / name).exists()), None)
        if pickle:
            raise InvalidAdapterError(
                f"{directory / pickle} is a pickle and can run code when it is loaded; convert it "
                "where you trust it: safetensors.torch.save_file(torch.load(path, "
                f"weights_only=True), '{WEIGHTS_FILE}')"
            )
        raise AdapterNotFoundError(
            f"{directory} has no {WEIGHTS_FILE}: give the directory that peft's save_pretrained "
            "wrote"
        )
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            shapes = {n: (str(v.get_dtype()), list(v.get_shape())) for n, v in views.items()}
    except (SafetensorError, OSError) as error:
        raise InvalidAdapterError(
            f"{path} is not a whole safetensors file ({error}): copy it again"
        ) from error
    if not shapes:
        raise InvalidAdapterError(f"{path} holds no tensors: save the adapter again")
    return shapes


def _target_modules(names: dict[str, Any]) -> tuple[str, ...]:
    """`base_model.model.….q_proj.lora_A.weight` → `q_proj`."""
    found = set()
    for name in names:
        module, lora, _ = name.partition(".lora_")
        if lora:
            found.add(module.rpartition(".")[2])
    return tuple(sorted(found))


def _widths(shapes: dict[str, tuple[str, list[int]]]) -> tuple[tuple[str, int, int], ...]:
    """`A` is (rank, in) and `B` is (out, rank), for linear layers; other kinds are left out."""
    found = set()
    for name, (_, a) in shapes.items():
        if name.endswith(".lora_A.weight"):
            _, b = shapes.get(name.replace(".lora_A.", ".lora_B."), ("", []))
            if len(a) == 2 and len(b) == 2:
                found.add((name.split(".")[-3], a[1], b[0]))
    return tuple(sorted(found))
