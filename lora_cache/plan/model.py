"""A model, as its ``config.json`` describes it.  No weights, no GPU, no vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cache.errors import ConfigError
from lora_cache.plan.architectures import KNOWN
from lora_cache.plan.blocks import Shape
from lora_cache.plan.fields import Fields
from lora_cache.plan.layers import Layer, check_split
from lora_cache.plan.quantization import Quantization, read_quantization

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_KV_ITEM_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1} | ITEM_BYTES
_SHORT = {"half": "float16", "float": "float32"}
_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """What planning needs to know of a model.

    Attributes:
        name: what the user gave, for the command line of vLLM.
        architecture: the one in its configuration.
        like: the one that it is reckoned as, if that is another; then all figures are estimates.
        dtype: of its weights, and of its slots unless they are told otherwise.
        max_len: the longest context that it was made for, or None.
    """

    name: str
    architecture: str
    like: str | None
    shape: Shape
    dtype: str
    quantization: Quantization
    max_len: int | None

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.shape.layers

    @property
    def is_estimate(self) -> bool:
        """Are the bytes of its weights approximated?"""
        return self.like is not None or self.quantization.is_estimate

    def weight_bytes(self, tp: int) -> int:
        """Bytes of the weights on each of `tp` GPUs.

        Raises:
            ConfigError: it cannot be divided among so many.
        """
        check_split(self.layers, tp)
        item = ITEM_BYTES[self.dtype]
        plain = self.shape.vectors + sum(layer.biases(tp) for layer in self.layers)
        plain += sum(layer.weights(tp) for layer in self.layers if not layer.quantizes)
        blocks = sum(layer.weights(tp) for layer in self.layers if layer.quantizes)
        return plain * item + self.quantization.nbytes(blocks)

    def kv_bytes_per_token(self, tp: int, dtype: str = "auto") -> int:
        """Bytes that one token of context takes on each of `tp` GPUs, in all layers.

        A key or value head is never cut: with more GPUs than heads, several hold the same one.
        """
        item = _KV_ITEM_BYTES.get(self.dtype if dtype == "auto" else dtype)
        if item is None:
            raise ConfigError(
                f"KV cache dtype {dtype!r}: there are auto, {', '.join(_KV_ITEM_BYTES)}"
            )
        heads = max(1, self.shape.kv_heads // tp)
        return 2 * self.shape.decoder_layers * heads * self.shape.head * item

    def adapter_numbers(self, rank: int) -> int:
        """Numbers in an adapter of `rank` for all linear layers, embeddings and head left out."""
        layers = [layer for layer in self.layers if layer.name not in ("embed_tokens", "lm_head")]
        return sum(layer.adapter_numbers(rank) for layer in layers)


def read_model(given: str | Path, *, like: str | None = None, dtype: str = "auto") -> Model:
    """Read a model's configuration.

    Args:
        given: a directory with a ``config.json``, that file, or a model of the Hub that is in
            the local cache.
        like: reckon it as this architecture.
        dtype: what vLLM is told to compute in; ``auto``: as the configuration says.

    Raises:
        ConfigError: there is none, it is malformed, or the architecture is not known.
    """
    config, path = read_config(given)
    return describe_model(config, str(given), str(path), like=like, dtype=dtype)


def read_config(given: str | Path) -> tuple[dict[str, Any], Path]:
    """Read a model's ``config.json``, which need not be of a known architecture.

    Args:
        given: as of `read_model`.

    Returns:
        what is in it, and where it is.

    Raises:
        ConfigError: there is none, or it is malformed.
    """
    path = _find(given)
    return _read(path), path


def describe_model(
    config: dict[str, Any],
    name: str,
    source: str,
    *,
    like: str | None = None,
    dtype: str = "auto",
) -> Model:
    """Make a model of a configuration that has been read; as `read_model`.

    Args:
        name: of the model.
        source: names the configuration, for messages.
    """
    architecture = _architecture(config, source)
    known = KNOWN.get(like or architecture)
    if known is None:
        raise ConfigError(_unknown(like or architecture, source))
    fields = Fields(config, source)
    found = _dtype(config, dtype, source)
    return Model(
        name=name,
        architecture=architecture,
        like=like if like != architecture else None,
        shape=known(fields),
        dtype=found,
        quantization=read_quantization(config, ITEM_BYTES[found]),
        max_len=fields.number("max_position_embeddings", 0) or None,
    )


def _find(given: str | Path) -> Path:
    path = Path(given).expanduser()
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return path
    if (cached := _in_hub_cache(str(given))) is not None:
        return cached
    raise ConfigError(
        f"{given}: no config.json there; give a directory that holds one, or the file itself "
        "(of a model of the Hub: hf download ORG/NAME config.json)"
    )


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        config = json.loads(text) if len(text) <= _MAX_CONFIG_BYTES else None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a model's configuration: a JSON object is expected")
    return config


def _architecture(config: dict[str, Any], path: str) -> str:
    found = config.get("architectures")
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise ConfigError(f"{path} names no architectures: is it a model's config.json?")
    return found[0]


def _unknown(architecture: str, path: str) -> str:
    if architecture.startswith("-") or not architecture.isidentifier():
        architecture = repr(architecture)
    return (
        f"{path}: {architecture} is not known here, so its slots cannot be reckoned; known are "
        f"{', '.join(KNOWN)}. If its layers are those of one of them, name that with --like; "
        "otherwise start vLLM with --max-loras 1 and with 2, and compare what it has left for "
        "the KV cache"
    )


def _dtype(config: dict[str, Any], dtype: str, path: str) -> str:
    given = dtype
    if dtype == "auto":
        given = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        given = given.removeprefix("torch.")
        # vLLM serves what was saved in float32 in bfloat16.
        given = "bfloat16" if given == "float32" else given
    given = _SHORT.get(given, given)
    if given not in ITEM_BYTES:
        raise ConfigError(f"{path}: dtype {given!r}: there are {', '.join(ITEM_BYTES)}")
    return given
