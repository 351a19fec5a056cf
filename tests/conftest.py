"""Fixtures of the whole suite; also `tests/{real,resident}/engines.py`, `tests/hub/fixtures.py`."""

import os
import tempfile
from collections.abc import Iterator

import pytest

from lora_cache.paths import cache_home

pytest_plugins = [
    "tests.real.engines",
    "tests.resident.engines",
    "tests.hub.fixtures",
    "tests.plan.allocated",
]

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need the Hub server are marked, so that the fast ones can be run without."""
    for item in items:
        if "hub_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.hub)
