"""Adapters that change, move, lie or block: each once was a defect."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_cache import AdapterRef, AsyncLoraCache, read_manifest
from lora_cache.catalog import Catalog
from lora_cache.errors import (
    AdapterChangedError,
    AdapterError,
    InvalidAdapterError,
    UnsupportedAdapterError,
)
from lora_cache.sources import LocalSource, local
from lora_cache.store import DiskTier
from lora_cache.testing import FakeEngine, ManualClock, settle
from tests.real.parts import write_adapter


def test_content_is_loaded_from_wherever_it_still_is(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one")
    two = Path(shutil.copytree(one, tmp_path / "two"))

    async def main() -> None:
        catalog = Catalog({"local": LocalSource()}, DiskTier())
        key = (await catalog.resolve(AdapterRef.local(one))).key
        assert (await catalog.resolve(AdapterRef.local(two))).key == key
        assert catalog[key].path == one
        shutil.rmtree(one)
        assert catalog[key].path == two
        assert (await catalog.resolve(AdapterRef.local(two))).key == key

    asyncio.run(main())


def test_a_link_that_leads_elsewhere_now_is_noticed(tmp_path: Path) -> None:
    for number in (1, 2):
        write_adapter(tmp_path / f"v{number}", seed=number)
    link = tmp_path / "current"
    link.symlink_to("v1")
    source, ref = LocalSource(), AdapterRef.local(link)
    first = source.resolve(ref)
    assert source.is_current(ref, first)
    link.unlink()
    link.symlink_to("v2")
    assert not source.is_current(ref, first)
    assert source.resolve(ref).key != first.key


def test_manifest_and_digest_are_of_one_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_adapter(tmp_path / "a", rank=4)

    def read_then_rewrite(directory: Path) -> Any:
        manifest = read_manifest(directory)
        write_adapter(path, rank=16)
        return manifest

    monkeypatch.setattr(local, "read_manifest", read_then_rewrite)
    with pytest.raises(AdapterChangedError, match="try again"):
        LocalSource().resolve(AdapterRef.local(path))


def test_what_changes_on_its_way_from_host_memory_into_a_slot_leaves_both(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", seed=1)

    async def main() -> None:
        clock = ManualClock()
        engine = FakeEngine(activate_s=1.0, clock=clock)
        async with AsyncLoraCache(engine, clock=clock, publish=False) as cache:
            assert await cache.prefetch(path) == "host"
            asked = asyncio.ensure_future(cache.lease(path).__aenter__())
            await settle()
            write_adapter(path, seed=2)
            await clock.advance(1.0)
            with pytest.raises(AdapterChangedError, match="try again"):
                await asked
            assert (await engine.holdings()).host == frozenset()
            assert await cache.reconcile() == 0

    asyncio.run(main())


@pytest.mark.parametrize("text", ["org/name\n", "org/name@main\n", "/tmp/\ud800", "a\x00b"])
def test_text_that_is_almost_a_name(text: str) -> None:
    with pytest.raises(AdapterError):
        AdapterRef.parse(text)


def test_a_pipe_instead_of_a_file_blocks_nobody(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    (path / "adapter_config.json").unlink()
    os.mkfifo(path / "adapter_config.json")
    with pytest.raises(InvalidAdapterError, match="not a regular file"):
        read_manifest(path)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"bias": "all"},
        {"layer_replication": [[0, 1]]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_vllm_would_refuse_is_refused_first(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAdapterError):
        read_manifest(write_adapter(tmp_path / "a", config=config))


@pytest.mark.parametrize(
    "config",
    [{"rank_pattern": {"q": -4}}, {"rank_pattern": {"q": 10**26}}, {"r": "8"}, {"r": True}],
    ids=str,
)
def test_senseless_ranks(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidAdapterError):
        read_manifest(write_adapter(tmp_path / "a", config=config))


def test_weights_of_another_rank_than_the_configuration_s(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterError, match="do not belong together"):
        read_manifest(write_adapter(tmp_path / "a", rank=8, config={"r": 4}))


def test_weights_that_are_no_lora(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    tensors = {"model.embed.weight": np.zeros((4, 4), np.float32)}
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapterError, match="no LoRA weights"):
        read_manifest(path)
