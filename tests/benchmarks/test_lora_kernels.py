"""Configurations of LoRA kernels are written as vLLM reads them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import lora_kernels, rig
from benchmarks.performance import RESULTS
from lora_cache.bench.models import LLAMA_8B

FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
GPU = "NVIDIA H100 80GB-HBM3"
FOUND = json.loads((RESULTS / "lora_kernels_h100.json").read_text())
COMMITTED = Path(lora_kernels.__file__).parents[1] / "data" / "lora_kernels"


AsVllmReads = Callable[[dict[str, Any], int, int], dict[str, Any]]


@pytest.fixture
def as_vllm_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[AsVllmReads]:
    """What vLLM launches a kernel with, by a measured row, slots and rank."""
    utils = pytest.importorskip("vllm.lora.ops.triton_ops.utils")
    from vllm import envs

    monkeypatch.setattr("torch.cuda.get_device_name", lambda: GPU)

    def found(row: dict[str, Any], slots: int, rank: int) -> dict[str, Any]:
        # Where an engine has run, vLLM remembers what the environment was then.
        monkeypatch.setitem(vars(envs), FOLDER, os.environ[FOLDER])
        shrinks = row["op"] == "shrink"
        return utils.get_lora_op_configs(  # type: ignore[no-any-return]
            row["op"],
            max_loras=slots + 1,
            batch=row["tokens"],
            hidden_size=row["width"] if shrinks else max(row["outputs"]),
            rank=rank,
            num_slices=len(row["outputs"]),
            add_inputs=None if shrinks else True,
        )

    remembers = (utils.load_lora_op_config, utils.get_lora_op_configs)
    for each in remembers:
        each.cache_clear()
    yield found
    for each in remembers:
        each.cache_clear()


@pytest.mark.vllm
def test_vllm_finds_what_was_written(
    as_vllm_reads: AsVllmReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(slots=4, rank=8)
    rows: dict[Any, dict[str, Any]] = {}
    for number, shape in enumerate(lora_kernels.shapes(LLAMA_8B)):
        row = {"op": shape.op, "width": shape.width, "outputs": list(shape.outputs)}
        row |= {"tokens": shape.tokens, "config": {"block_m": number}}
        size = shape.width if shape.op == "shrink" else max(shape.outputs)
        # o_proj's and down_proj's B are alike: the last one counts.
        rows[shape.op, shape.slices, shape.tokens, size] = row
    lora_kernels.write(tmp_path, GPU, options, list(rows.values()))
    others = [row | {"config": {"block_m": -1}} for row in rows.values()]
    lora_kernels.write(tmp_path, GPU, argparse.Namespace(slots=4, rank=16), others)
    lora_kernels.write(tmp_path, GPU, argparse.Namespace(slots=2, rank=8), others)
    monkeypatch.setenv(FOLDER, "what was there before comes back")
    rig.use_kernels(tmp_path)
    for row in rows.values():
        assert as_vllm_reads(row, 4, 8) == row["config"]
        assert as_vllm_reads(row, 4, 16) == as_vllm_reads(row, 2, 8) == {"block_m": -1}


@pytest.mark.vllm
def test_the_files_that_are_committed_are_those_that_were_measured(
    as_vllm_reads: AsVllmReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, rank = FOUND["options"]["slots"], FOUND["options"]["rank"]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: FOUND["device"])
    monkeypatch.setenv(FOLDER, str(COMMITTED))
    different = {json.dumps(row["config"]) for row in FOUND["rows"]}
    assert len(different) > 10
    for row in FOUND["rows"]:
        if (row["op"], row["outputs"]) != ("expand", [4096]):  # o_proj's and down_proj's are alike
            assert as_vllm_reads(row, slots, rank) == row["config"]


@pytest.mark.parametrize("rank", [8, 16, 128])
def test_what_is_tried_divides_the_input(rank: int) -> None:
    for shape in lora_kernels.shapes(LLAMA_8B):
        tried = list(lora_kernels.candidates(shape, rank))
        assert len(tried) >= 20
        assert len({json.dumps(config) for config in tried}) == len(tried)
        for config in tried if shape.op == "shrink" else []:
            block_k, split_k = config["block_k"], config["split_k"]
            assert shape.width % ((block_k or 0) * (split_k or 0)) == 0


def test_a_step_is_all_kernels_of_all_layers() -> None:
    row = {"default_us": 30.0, "us": 10.0, "active_us": 9.0}
    rows = [{"tokens": 16, **row}, {"tokens": 16, **row}, {"tokens": 32, **row}]
    assert lora_kernels.steps(rows, 2) == [(16, 0.12, 0.04, 0.036), (32, 0.06, 0.02, 0.018)]
