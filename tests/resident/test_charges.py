"""What is charged for an adapter before it is packed, against what its images take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.engines.resident.charges import Charges
from lora_cache.engines.resident.layout import Layout
from lora_cache.manifest import read_manifest
from tests.resident.layouts import plain_layout
from tests.resident.parts import HIDDEN, LAYERS, LINEAR, MAX_RANK, module_name, write_adapter

pytest.importorskip("torch")

import torch

from lora_cache.engines.resident.packing import examine

Adapter = Callable[..., Path]


def taken(path: Path, *layouts: Layout) -> int:
    return sum(layout.nbytes(examine(layout, path)) for layout in layouts)


@pytest.fixture(scope="module")
def by_targets(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("charges")

    def make(targets: tuple[str, ...], rank: int, dtype: str) -> Path:
        path = root / "-".join((*targets, str(rank), dtype))
        if not path.exists():
            write_adapter(path, targets=targets, rank=rank, dtype=dtype)
        return path

    return make


@given(
    targets=st.sets(st.sampled_from(LINEAR), min_size=1),
    rank=st.integers(1, MAX_RANK),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    slot_dtype=st.sampled_from(["float32", "bfloat16"]),
    workers=st.integers(1, 2),
)
def test_an_adapter_of_all_layers_is_charged_what_it_takes(
    by_targets: Callable[..., Path],
    targets: set[str],
    rank: int,
    dtype: str,
    slot_dtype: str,
    workers: int,
) -> None:
    layouts = [plain_layout(slot_dtype)] * workers
    path = by_targets(tuple(sorted(targets)), rank, dtype)
    assert Charges(layouts).of(read_manifest(path)) == taken(path, *layouts) > 0


def test_one_of_some_layers_or_ranks_is_charged_no_less(adapter: Adapter) -> None:
    layout = plain_layout()
    charges = Charges([layout])
    patterned = adapter(rank=3, rank_pattern={"q_proj": 9}, ranks={"q_proj": 9})
    assert charges.of(read_manifest(patterned)) == taken(patterned, layout), "padded to the largest"
    smaller = dict.fromkeys(LINEAR, 3)
    less = adapter(rank=9, rank_pattern=smaller, ranks=smaller)
    assert charges.of(read_manifest(less)) > taken(less, layout)
    halves = {"lora_A": torch.ones(2, HIDDEN), "lora_B": torch.ones(HIDDEN, 2)}
    first = {f"{module_name(0, 'q_proj')}.{half}.weight": of for half, of in halves.items()}
    one_layer = adapter(rank=2, targets=(), extra=first)
    assert charges.of(read_manifest(one_layer)) == LAYERS * taken(one_layer, layout)


def test_one_that_only_vllm_knows_is_charged_no_less_than_its_file(adapter: Adapter) -> None:
    layout = plain_layout()
    charges = Charges([layout, layout])
    manifest = read_manifest(adapter(rank=2, targets=("q_proj", "experts")))
    assert charges.of(manifest) == max(2 * layout.max_nbytes(2), 2 * manifest.nbytes)
    assert charges.of(replace(manifest, nbytes=1 << 30)) == 2 << 30
