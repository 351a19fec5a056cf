"""The manifest: true facts of good adapters, and a usable refusal of every bad one."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_cache.demo.catalogue import ADAPTERS, adapter_dir
from lora_cache.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    LoraCacheError,
    UnsupportedAdapterError,
)
from lora_cache.manifest import CONFIG_FILE, WEIGHTS_FILE, Manifest, read_manifest, read_stamp
from tests.real.parts import write_adapter

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
A, B = "m.layers.0.self_attn.q_proj.lora_A.weight", "m.layers.0.self_attn.q_proj.lora_B.weight"

not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tensors_of(dtype: str, item_bytes: int) -> bytes:
    """A pair of 2×3 and 3×2 matrices of any dtype, as a file."""
    half = 6 * item_bytes
    header = {
        A: {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, half]},
        B: {"dtype": dtype, "shape": [3, 2], "data_offsets": [half, 2 * half]},
    }
    return safetensors(json.dumps(header).encode(), bytes(2 * half))


GOOD_WEIGHTS = tensors_of("F32", 4)


def write_raw(
    directory: Path, *, config: object = CONFIG, weights: bytes | None = GOOD_WEIGHTS
) -> Path:
    """An adapter of exactly these bytes; a `config` that is no bytes is written as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    (directory / CONFIG_FILE).write_bytes(raw)
    if weights is not None:
        (directory / WEIGHTS_FILE).write_bytes(weights)
    return directory


def refusal(directory: Path, error: type[LoraCacheError], *words: str) -> str:
    """The message with which `directory` is refused, by exactly `error`."""
    with pytest.raises(LoraCacheError) as caught:
        read_manifest(directory)
    assert type(caught.value) is error
    message = str(caught.value)
    for word in (str(directory), *words):
        assert word in message
    return message


@contextmanager
def little_memory(mib: int = 64) -> Iterator[None]:
    """The process's high-water mark rises by no more than `mib`, whatever allocated it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < mib << 10


# ---------------------------------------------------------------------------- good adapters


def test_facts_of_a_plain_adapter(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", rank=4, targets=("v_proj", "q_proj", "down_proj"))
    stored = load_file(directory / WEIGHTS_FILE)
    assert read_manifest(directory) == Manifest(
        rank=4,
        alpha=8.0,
        scaling=2.0,
        target_modules=("down_proj", "q_proj", "v_proj"),
        widths=(("down_proj", 256, 128), ("q_proj", 128, 128), ("v_proj", 128, 128)),
        dtypes=("F32",),
        base_model="tiny",
        nbytes=sum(tensor.nbytes for tensor in stored.values()),
        tensor_count=12,
    )


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", rank=16, config={"lora_alpha": 24})
    stable = write_adapter(
        tmp_path / "stable", rank=16, config={"lora_alpha": 24, "use_rslora": True}
    )
    assert read_manifest(plain).scaling == 1.5
    assert read_manifest(stable).scaling == 6.0


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [
        (None, 8),
        ({}, 8),
        ({"q_proj": 4}, 8),
        ({"q_proj": 64}, 64),
        ({"q_proj": 16, "v_proj": 32, "o_proj": 2}, 32),
    ],
)
def test_rank_is_the_largest_one_with_rank_pattern_included(
    tmp_path: Path, pattern: dict[str, int] | None, rank: int
) -> None:
    manifest = read_manifest(write_raw(tmp_path / "a", config={**CONFIG, "rank_pattern": pattern}))
    assert manifest.rank == rank
    assert manifest.scaling == 2.0, "the scaling is that of r, whatever the patterns"


@pytest.mark.parametrize(
    ("dtype", "item_bytes"),
    [("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2), ("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1)],
)
def test_bytes_are_those_of_the_tensors_for_every_dtype(
    tmp_path: Path, dtype: str, item_bytes: int
) -> None:
    manifest = read_manifest(write_raw(tmp_path / "a", weights=tensors_of(dtype, item_bytes)))
    assert manifest.dtypes == (dtype,)
    assert manifest.nbytes == 12 * item_bytes
    assert manifest.tensor_count == 2


def test_mixed_dtypes_are_listed_once_and_sorted(tmp_path: Path) -> None:
    directory = write_raw(tmp_path / "a", weights=None)
    save_file(
        {
            A: np.zeros((2, 3), np.float32),
            B: np.zeros((3, 2), np.float16),
            A.replace("q_", "v_"): np.zeros((2, 3), np.float32),
        },
        directory / WEIGHTS_FILE,
    )
    manifest = read_manifest(directory)
    assert manifest.dtypes == ("F16", "F32")
    assert manifest.nbytes == 24 + 12 + 24
    assert manifest.target_modules == ("q_proj", "v_proj")


def test_target_modules_are_those_that_carry_weights_not_those_that_were_asked_for(
    tmp_path: Path,
) -> None:
    config = {"target_modules": "all-linear"}
    directory = write_adapter(tmp_path / "a", targets=("o_proj",), config=config)
    assert read_manifest(directory).target_modules == ("o_proj",)


def test_config_may_leave_out_all_but_rank_and_alpha(tmp_path: Path) -> None:
    manifest = read_manifest(write_raw(tmp_path / "a", config={"r": 2, "lora_alpha": 3}))
    assert (manifest.rank, manifest.alpha, manifest.scaling) == (2, 3.0, 1.5)
    assert manifest.base_model is None


@pytest.mark.parametrize("peft_type", ["LORA", "lora", "Lora"])
def test_peft_type_is_read_in_any_case(tmp_path: Path, peft_type: str) -> None:
    assert read_manifest(write_raw(tmp_path / "a", config={**CONFIG, "peft_type": peft_type}))


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    directory = write_raw(tmp_path / "a")
    (directory / "adapter_model.bin").write_bytes(b"never read")
    assert read_manifest(directory).tensor_count == 2


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_demo_adapters_are_what_their_recipes_say(name: str) -> None:
    recipe, manifest = ADAPTERS[name], read_manifest(adapter_dir(name))
    divisor = math.sqrt(recipe.rank) if recipe.use_rslora else recipe.rank
    layers = 30 if recipe.layers is None else len(recipe.layers)
    assert manifest.rank == recipe.rank
    assert manifest.alpha == recipe.alpha
    assert manifest.scaling == pytest.approx(recipe.alpha / divisor)
    assert manifest.target_modules == tuple(sorted(recipe.target_modules))
    assert manifest.tensor_count == 2 * layers * len(recipe.target_modules)
    assert manifest.dtypes == ("BF16",)
    assert manifest.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    raw = (adapter_dir(name) / WEIGHTS_FILE).read_bytes()
    assert manifest.nbytes == len(raw) - 8 - int.from_bytes(raw[:8], "little")


# ---------------------------------------------------------------------------- bad directories


def test_a_missing_directory_is_not_found(tmp_path: Path) -> None:
    refusal(tmp_path / "none", AdapterNotFoundError, "is not a directory", "save_pretrained")


def test_a_file_in_place_of_the_directory_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refusal(tmp_path / "file", AdapterNotFoundError, "is not a directory", "save_pretrained")


def test_a_directory_without_config_is_not_found(tmp_path: Path) -> None:
    (write_raw(tmp_path / "a") / CONFIG_FILE).unlink()
    refusal(tmp_path / "a", AdapterNotFoundError, f"has no {CONFIG_FILE}", "save_pretrained")


def test_a_directory_without_weights_is_not_found(tmp_path: Path) -> None:
    refusal(write_raw(tmp_path / "a", weights=None), AdapterNotFoundError, f"has no {WEIGHTS_FILE}")


def test_a_dangling_link_in_place_of_the_weights_is_not_found(tmp_path: Path) -> None:
    directory = write_raw(tmp_path / "a", weights=None)
    (directory / WEIGHTS_FILE).symlink_to(tmp_path / "nowhere")
    refusal(directory, AdapterNotFoundError, f"has no {WEIGHTS_FILE}")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    directory = write_raw(tmp_path / "a")
    (directory / name).unlink()
    (directory / name).mkdir()
    with pytest.raises((InvalidAdapterError, AdapterNotFoundError), match=re.escape(name)):
        read_manifest(directory)


@not_as_root
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_an_unreadable_file_is_invalid(tmp_path: Path, name: str) -> None:
    directory = write_raw(tmp_path / "a")
    (directory / name).chmod(0)
    refusal(directory, InvalidAdapterError, name)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path, name: str) -> None:
    directory = write_raw(tmp_path / "a", weights=None)
    (directory / name).write_bytes(b"\x80\x04N.")
    message = refusal(directory, InvalidAdapterError, name, "is a pickle", "can run code")
    assert "safetensors.torch.save_file(torch.load(path, weights_only=True)" in message
    assert WEIGHTS_FILE in message


# ---------------------------------------------------------------------------- bad configs


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"r": 8,}',
        b"not json",
        b"\xff\xfe\x00",
        b'{"r": 8, "lora_alpha": "\x80"}',
        b'{"r": 1' + b"0" * 5000 + b', "lora_alpha": 1}',
        b"[" * 100_000,
        b'{"r":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
    ],
    ids=[
        "empty", "cut", "trailing comma", "words", "bad utf-16", "bad utf-8", "endless number",
        "deep array", "deep object", "deep and closed",
    ],
)  # fmt: skip
def test_what_is_not_json_is_invalid(tmp_path: Path, raw: bytes) -> None:
    directory = write_raw(tmp_path / "a", config=raw)
    refusal(directory, InvalidAdapterError, CONFIG_FILE, "is not valid JSON")


@pytest.mark.parametrize("raw", [b"[1]", b"null", b'"LORA"', b"8", b"true"])
def test_json_that_is_no_object_is_invalid(tmp_path: Path, raw: bytes) -> None:
    refusal(write_raw(tmp_path / "a", config=raw), InvalidAdapterError, CONFIG_FILE, "dictionary")


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    directory = write_raw(tmp_path / "a")
    os.truncate(directory / CONFIG_FILE, 8 << 30)  # sparse: reading it would take the memory
    with little_memory():
        refusal(directory, InvalidAdapterError, CONFIG_FILE, "larger than")


@pytest.mark.parametrize("rank", [0, -1, "8x", "", None, 1.5, [8], 65537, 10**300])
def test_a_senseless_rank_is_invalid_and_named(tmp_path: Path, rank: object) -> None:
    directory = write_raw(tmp_path / "a", config={**CONFIG, "r": rank})
    refusal(directory, InvalidAdapterError, CONFIG_FILE, ": r: Input should be")


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e400", '"x"', "null", "[]"])
def test_a_senseless_alpha_is_invalid_and_named(tmp_path: Path, alpha: str) -> None:
    directory = write_raw(tmp_path / "a", config=f'{{"r": 8, "lora_alpha": {alpha}}}'.encode())
    refusal(directory, InvalidAdapterError, CONFIG_FILE, ": lora_alpha: Input should be")


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_missing_setting_is_invalid_and_named(tmp_path: Path, name: str) -> None:
    config = {key: value for key, value in CONFIG.items() if key != name}
    refusal(write_raw(tmp_path / "a", config=config), InvalidAdapterError, f": {name}: Field requ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank_pattern", {"q_proj": "many"}),
        ("rank_pattern", [8]),
        ("target_modules", 7),
        ("peft_type", 3),
        ("use_rslora", "perhaps"),
    ],
)
def test_a_setting_of_the_wrong_type_is_invalid_and_named(
    tmp_path: Path, name: str, value: object
) -> None:
    directory = write_raw(tmp_path / "a", config={**CONFIG, name: value})
    refusal(directory, InvalidAdapterError, CONFIG_FILE, f": {name}")


@pytest.mark.parametrize("peft_type", ["IA3", "PROMPT_TUNING", "ADALORA", ""])
def test_what_is_not_a_lora_is_unsupported(tmp_path: Path, peft_type: str) -> None:
    directory = write_raw(tmp_path / "a", config={**CONFIG, "peft_type": peft_type})
    refusal(directory, UnsupportedAdapterError, repr(peft_type), "only LORA")


def test_dora_is_unsupported_with_both_ways_out(tmp_path: Path) -> None:
    directory = write_raw(tmp_path / "a", config={**CONFIG, "use_dora": True})
    refusal(directory, UnsupportedAdapterError, "DoRA", "merge it", "use_dora=False")


# ---------------------------------------------------------------------------- bad weights

CUTS = sorted({0, 1, 7, 8, 9, *(len(GOOD_WEIGHTS) * i // 16 for i in range(16))})


@pytest.mark.parametrize("cut", [*CUTS, len(GOOD_WEIGHTS) - 1])
def test_truncated_weights_are_invalid_wherever_they_end(tmp_path: Path, cut: int) -> None:
    directory = write_raw(tmp_path / "a", weights=GOOD_WEIGHTS[:cut])
    refusal(directory, InvalidAdapterError, WEIGHTS_FILE, "not a whole safetensors", "copy it")


def test_weights_with_bytes_to_spare_are_invalid(tmp_path: Path) -> None:
    directory = write_raw(tmp_path / "a", weights=GOOD_WEIGHTS + b"\0")
    refusal(directory, InvalidAdapterError, WEIGHTS_FILE, "not a whole safetensors", "copy it")


@pytest.mark.parametrize(
    "header",
    [
        b"garbage!",
        b"\xff" * 64,
        b"[]",
        b"{}x",
        b"[" * 50_000,
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 0]}}',
    ],
    ids=[
        "words", "no utf-8", "array", "trailing", "deep", "data missing", "offsets reversed",
        "negative shape", "unknown dtype", "terabytes", "overflow", "beyond 64 bits",
    ],
)  # fmt: skip
def test_a_senseless_header_is_invalid(tmp_path: Path, header: bytes) -> None:
    directory = write_raw(tmp_path / "a", weights=safetensors(header))
    with little_memory():
        refusal(directory, InvalidAdapterError, WEIGHTS_FILE, "not a whole safetensors")


@pytest.mark.parametrize("length", [0, 1 << 20, 99_000_000, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_invalid_and_allocates_nothing(
    tmp_path: Path, length: int
) -> None:
    weights = length.to_bytes(8, "little") + GOOD_WEIGHTS[8:]
    with little_memory():
        refusal(
            write_raw(tmp_path / "a", weights=weights), InvalidAdapterError, "not a whole safet"
        )


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__": {"format": "pt"}}'])
def test_weights_without_tensors_are_invalid(tmp_path: Path, header: bytes) -> None:
    directory = write_raw(tmp_path / "a", weights=safetensors(header))
    refusal(directory, InvalidAdapterError, WEIGHTS_FILE, "holds no tensors")


@pytest.mark.parametrize(
    ("dtype", "item_bytes"), [("I64", 8), ("I32", 4), ("U8", 1), ("BOOL", 1), ("U16", 2)]
)
def test_weights_of_integers_are_unsupported_and_say_what_to_save(
    tmp_path: Path, dtype: str, item_bytes: int
) -> None:
    directory = write_raw(tmp_path / "a", weights=tensors_of(dtype, item_bytes))
    refusal(directory, UnsupportedAdapterError, f"dtype {dtype}", "bfloat16")


# ---------------------------------------------------------------------------- anything at all


def read_or_refuse(**files: Any) -> Manifest | None:
    """The manifest, or None where it is refused as it must be; all else fails the test."""
    with tempfile.TemporaryDirectory() as place:
        directory = write_raw(Path(place), **files)
        try:
            return read_manifest(directory)
        except LoraCacheError as error:
            message = str(error)
    assert str(directory) in message
    return None


@st.composite
def mutations(draw: st.DrawFn, of: bytes) -> bytes:
    """`of` with a few bytes overwritten, cut out or put in."""
    raw = bytearray(of)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        end = min(len(raw), start + draw(st.integers(0, 3)))
        raw[start:end] = draw(st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"9", b"0]"]))
    return bytes(raw)


HEADER_END = 8 + int.from_bytes(GOOD_WEIGHTS[:8], "little")


@settings(max_examples=150, deadline=None)
@given(header=mutations(GOOD_WEIGHTS[8:HEADER_END]))
def test_a_mutated_header_is_read_or_refused(header: bytes) -> None:
    manifest = read_or_refuse(weights=safetensors(header, GOOD_WEIGHTS[HEADER_END:]))
    assert manifest is None or manifest.nbytes <= len(GOOD_WEIGHTS)


@settings(max_examples=100, deadline=None)
@given(weights=mutations(GOOD_WEIGHTS) | st.binary(max_size=200))
def test_a_mutated_weights_file_is_read_or_refused(weights: bytes) -> None:
    with little_memory():
        manifest = read_or_refuse(weights=weights)
    assert manifest is None or manifest.nbytes <= len(weights)


@settings(max_examples=150, deadline=None)
@given(config=mutations(json.dumps(CONFIG).encode()) | st.binary(max_size=100))
def test_a_mutated_config_is_read_or_refused(config: bytes) -> None:
    manifest = read_or_refuse(config=config)
    assert manifest is None or (manifest.rank > 0 and math.isfinite(manifest.scaling))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(), SCALARS, max_size=2)
SETTINGS = ["peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora"]


@settings(max_examples=100, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from([*SETTINGS, "rank_pattern", "base_model_name_or_path"]), JSON, max_size=3
    )
)
def test_any_value_of_any_setting_is_read_or_refused(changes: dict[str, object]) -> None:
    manifest = read_or_refuse(config={**CONFIG, **changes})
    assert manifest is None or (manifest.rank > 0 and math.isfinite(manifest.scaling))


# ---------------------------------------------------------------------------- stamps


def test_stamps_of_unchanged_files_are_equal_and_of_others_are_not(tmp_path: Path) -> None:
    one, two = write_raw(tmp_path / "one"), write_raw(tmp_path / "two")
    assert read_stamp(one) == read_stamp(one)
    assert read_stamp(one) != read_stamp(two)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_stamp_needs_both_files(tmp_path: Path, name: str) -> None:
    directory = write_raw(tmp_path / "a")
    (directory / name).unlink()
    with pytest.raises(AdapterNotFoundError, match=re.escape(str(directory))):
        read_stamp(directory)
