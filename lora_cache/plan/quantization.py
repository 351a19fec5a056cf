"""How many bytes a weight takes, by the ``quantization_config`` of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Weights that share a scale, where the configuration does not say.
_GROUP = 128
_SCALE_BITS = 16


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the linear layers of the blocks are stored in; embeddings, head and norms are not.

    Attributes:
        name: of the method, or "none".
        bits: of a weight, scales and zero points included.
        is_estimate: the method's details are approximated.
    """

    name: str
    bits: float
    is_estimate: bool = True

    def nbytes(self, weights: int) -> int:
        """Bytes of so many weights."""
        return -int(-weights * self.bits // 8)


def read_quantization(config: Mapping[str, Any], item_bytes: int) -> Quantization:
    """What a configuration says of quantization.

    Args:
        item_bytes: of a weight that is not quantized.
    """
    given = config.get("quantization_config")
    if not isinstance(given, Mapping):
        return Quantization("none", 8 * item_bytes, is_estimate=False)
    method = str(given.get("quant_method", "unknown")).lower()
    bits, group = _bits(given, method), _size(given.get("group_size")) or _GROUP
    if bits is None:
        return Quantization(method, 8 * item_bytes)
    scale = _SCALE_BITS / group if bits < 8 else 0.0
    zero = bits / group if method in ("awq", "gptq") else 0.0
    if method == "mxfp4":
        scale = 8 / 32  # one shared exponent for 32 weights
    return Quantization(method, bits + scale + zero)


def _bits(given: Mapping[str, Any], method: str) -> float | None:
    if (bits := _size(given.get("bits")) or _size(given.get("w_bit"))) is not None:
        return bits
    if method in ("fp8", "fbgemm_fp8", "modelopt"):
        return 8
    if method == "mxfp4":
        return 4
    if method == "bitsandbytes":
        return 4 if given.get("load_in_4bit") else 8
    groups = given.get("config_groups")
    if method == "compressed-tensors" and isinstance(groups, Mapping):
        weights = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)]
        found = [_size(w.get("num_bits")) for w in weights if isinstance(w, Mapping)]
        return max((bits for bits in found if bits), default=None)
    return None


def _size(value: Any) -> int | None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 < value < 1 << 20 else None
