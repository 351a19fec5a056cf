"""Our reader of safetensors files beside the library's, and what it refuses."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cache.engines.resident import weights_file
from lora_cache.engines.resident.weights_file import WeightsFile
from lora_cache.errors import CannotPackError, InvalidAdapterError

torch = pytest.importorskip("torch")

DTYPES = ["float64", "float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"]
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6), st.randoms())
@settings(max_examples=60, deadline=None)
def test_it_finds_what_the_library_has_written(given: list[Any], rng: Any) -> None:
    from safetensors.torch import save_file

    tensors = {
        f"t{number}": torch.randint(0, 100, shape).to(getattr(torch, dtype))
        for number, (dtype, shape) in enumerate(given)
    }
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "weights"
        save_file(tensors, path, metadata={"format": "pt", "dtype": "x"})
        file = WeightsFile(path)
        found = file.tensors
        assert found.keys() == tensors.keys()
        buffers = {name: memoryview(bytearray(each.nbytes)) for name, each in found.items()}
        order = sorted(found, key=lambda name: (found[name].start, rng.random()))
        file.read([(found[name].start, buffers[name]) for name in order])
        rng.shuffle(order)
        again = {name: memoryview(bytearray(each.nbytes)) for name, each in found.items()}
        file.read([(found[name].start, again[name]) for name in order])
        file.close()
    for name, tensor in tensors.items():
        assert (f"torch.{found[name].dtype}", found[name].shape) == (
            str(tensor.dtype),
            tuple(tensor.shape),
        )
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert bytes(buffers[name]) == bytes(again[name]) == raw


def written(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


DAMAGED: dict[str, Callable[[Path], Path]] = {
    "empty": lambda path: raw(path, b""),
    "a few bytes": lambda path: raw(path, b"abc"),
    "a header beyond the end": lambda path: written(path, {}, length=1 << 40),
    "a negative length": lambda path: written(path, {}, length=(1 << 64) - 1),
    "no JSON": lambda path: written(path, b"{{{{"),
    "a list": lambda path: written(path, []),
    "deep": lambda path: written(path, b"[" * 100_000),
    "no dtype": lambda path: written(path, {"a": tensor(dtype=None)}, bytes(8)),
    "no tensor": lambda path: written(path, {"a": 5}),
    "no offsets": lambda path: written(path, {"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "cut": lambda path: written(path, {"a": tensor()}, bytes(7)),
    "before the start": lambda p: written(p, {"a": tensor(data_offsets=[-8, 0])}, bytes(8)),
    "another size": lambda path: written(path, {"a": tensor(shape=[3])}, bytes(8)),
    "turned round": lambda path: written(path, {"a": tensor(data_offsets=[8, 0])}, bytes(8)),
    "negative shapes": lambda path: written(path, {"a": tensor(shape=[-1, -2])}, bytes(8)),
    "words": lambda path: written(path, {"a": tensor(shape=["2"])}, bytes(8)),
    "halves": lambda path: written(path, {"a": tensor(data_offsets=[0.0, 8.0])}, bytes(8)),
    "a directory": lambda path: path.mkdir() or path,  # type: ignore[func-returns-value]
    "nothing": lambda path: path,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InvalidAdapterError, match="weights cannot be read"):
        WeightsFile(DAMAGED[name](tmp_path / "weights"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("dtype", ["U8", "I64", "BOOL", "F4", ""])
def test_an_unknown_dtype_is_left_to_vllm(tmp_path: Path, dtype: Any) -> None:
    path = written(tmp_path / "weights", {"a": tensor(dtype=dtype)}, bytes(8))
    with pytest.raises(CannotPackError, match="a is of dtype"):
        WeightsFile(path)


def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path) -> None:
    file = WeightsFile(written(tmp_path / "weights", {"a": tensor()}, bytes(8)))
    os.truncate(file.path, os.path.getsize(file.path) - 1)
    with pytest.raises(InvalidAdapterError, match="was cut while it was read"):
        file.read([(file.tensors["a"].start, memoryview(bytearray(8)))])
    file.close()


def test_reads_that_bring_less_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = bytes(range(200))
    file = WeightsFile(written(tmp_path / "weights", {}, body))
    start, real = os.path.getsize(file.path) - len(body), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, out, at: real(fd, [out[0][:7]], at))
    monkeypatch.setattr(weights_file, "_MAX_BUFFERS", 3)
    buffers = [memoryview(bytearray(20)) for _ in range(10)]
    file.read([(start + 20 * number, buffer) for number, buffer in enumerate(buffers)])
    assert b"".join(buffers) == body
    file.close()
