"""Fixtures of the whole suite; also `tests/{real,resident}/engines.py`, `tests/hub/fixtures.py`."""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from lora_cache.paths import cache_home

pytest_plugins = [
    "tests.real.engines",
    "tests.resident.engines",
    "tests.hub.fixtures",
    "tests.plan.allocated",
]

# How long an example takes says how busy the machine is, or that it was the first to import torch.
# On top of Hypothesis' own profile, which is another one where it knows a CI.
settings.register_profile("lora_cache", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lora_cache")
# For `make fast`: a look, not a search.
settings.register_profile("fast", settings.get_profile("lora_cache"), max_examples=25)

# Caches that tests open are no business of `lora-cache status`.
os.environ["LORA_CACHE_STATUS_DIR"] = tempfile.mkdtemp(prefix="lora-cache-tests-")
# Nor is what they keep any business of the user's home, but for the demo's model: that takes half a
# minute to make, and is made once.
_home = tempfile.TemporaryDirectory(prefix="lora-cache-tests-")
_demo = cache_home() / "demo"
_demo.mkdir(parents=True, exist_ok=True)
os.symlink(_demo, os.path.join(_home.name, "demo"))
os.environ["LORA_CACHE_HOME"] = _home.name


@pytest.fixture(scope="session", autouse=True)
def memory_of_this_machine_is_not_watched() -> Iterator[None]:
    """What else runs here must not decide how a test ends; those of pressure bring a sampler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_cache.cache.make_sampler", lambda config: None)
        yield


def pytest_itemcollected(item: pytest.Item) -> None:
    # Before any are chosen by their marks.
    if "hub_server" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.hub)


@pytest.hookimpl(trylast=True)  # after xdist's own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Long tests begin early, lest one process be left with one when all others are done.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items:
        _keep_group(item)


def _keep_group(item: Any) -> None:
    """Let xdist 3.8 see its groups, also with pytest 9.2.

    It marks them in `_nodeid`, which pytest looks at no longer (pytest-xdist#1386): without a word,
    a server that is meant for one process was started by all of them.
    """
    if "_nodeid" in vars(item):
        item._id = item.id.parse(item._nodeid)
