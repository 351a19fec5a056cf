"""Whatever goes in, what comes out as an error is one of ours, and nothing has changed."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache import AsyncLoraCache
from lora_cache.errors import ConfigError, LoraCacheError
from lora_cache.manifest import CONFIG_FILE, WEIGHTS_FILE
from lora_cache.testing import FakeEngine
from tests.real.parts import write_adapter

#: Every way in, for an adapter.
ENTRANCES: dict[str, Callable[[AsyncLoraCache, Any], Any]] = {
    "lease": lambda cache, adapter: cache.lease(adapter).__aenter__(),
    "generate": lambda cache, adapter: anext(cache.generate("Hello", None, adapter)),
    "prefetch": lambda cache, adapter: cache.prefetch(adapter),
    "pin": lambda cache, adapter: cache.pin(adapter),
    "warm": lambda cache, adapter: cache.warm([adapter]),
}

BAD_NAMES = [
    "",
    "\x00",
    "a\nb",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "acme/sql/too/deep",
    "acme/sql@",
    "acme/sql@../x",
    "acme/..",
    "\udcff",
    "a" * 5000,
    "~nobody-of-this-name/x",
]


async def refused(adapter: Any, entrance: str) -> None:
    cache = AsyncLoraCache(FakeEngine(), check_weights=True, publish=False)
    async with cache:
        with pytest.raises(LoraCacheError) as caught:
            await ENTRANCES[entrance](cache, adapter)
        assert type(caught.value).__module__ == "lora_cache.errors"
        assert str(caught.value)
        assert cache.snapshot().adapters == ()


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name[:20]))
def test_bad_names(name: str, entrance: str) -> None:
    asyncio.run(refused(name, entrance))


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    "thing", [7, object(), b"acme/sql", ["acme/sql"]], ids=lambda thing: type(thing).__name__
)
def test_things_that_name_no_adapter(thing: Any, entrance: str) -> None:
    asyncio.run(refused(thing, entrance))


@given(
    config=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.sampled_from(["r", "lora_alpha", "peft_type", "rank_pattern", "bias", "use_dora"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner),
                max_leaves=4,
            ),
        ).map(lambda config: json.dumps(config).encode()),
    ),
    weights=st.binary(max_size=200),
)
def test_any_bytes(config: bytes, weights: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / CONFIG_FILE).write_bytes(config)
        (Path(directory) / WEIGHTS_FILE).write_bytes(weights)
        asyncio.run(refused(directory, "lease"))


@given(data=st.data())
def test_one_byte_changed(data: st.DataObject) -> None:
    """Served or refused: never an error of another package."""
    with tempfile.TemporaryDirectory() as directory:
        adapter = write_adapter(Path(directory) / "a")
        path = adapter / data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
        raw = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, min(len(raw), 2000) - 1))
        raw[position] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)

        async def serve() -> None:
            cache = AsyncLoraCache(FakeEngine(), check_weights=True, publish=False)
            async with cache:
                try:
                    async with cache.lease(adapter):
                        pass
                except LoraCacheError:
                    assert cache.snapshot().adapters == ()

        asyncio.run(serve())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_slots": 3},
        {"max_loras": 0},
        {"max_loras": "many"},
        {"max_loras": 999},
        {"max_cpu_loras": 999},
        {"host_bytes": "a lot"},
        {"host_bytes": -1},
        {"policy": "mru"},
        {"policy": 7},
        {"policy": dict},
        {"host_policy": "mru"},
        {"lease_timeout_s": 0},
        {"drain_after_s": -1},
        {"drain_after_s": "soon"},
        {"check_weights": "perhaps"},
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AsyncLoraCache(FakeEngine(), **settings)


@pytest.mark.parametrize(
    "target", [None, 7, "meta-llama/Llama-3.1-8B", object()], ids=lambda thing: type(thing).__name__
)
def test_what_is_no_engine(target: Any) -> None:
    with pytest.raises(ConfigError):
        AsyncLoraCache(target)
