"""Fixtures of the whole suite; also `tests/{real,resident}/engines.py`, `tests/hub/fixtures.py`."""

import os
import tempfile

import pytest

pytest_plugins = [
    "tests.real.engines",
    "tests.resident.engines",
    "tests.hub.fixtures",
    "tests.plan.allocated",
]

# Caches that tests open are no business of `lora-cache status`.
os.environ["LORA_CACHE_STATUS_DIR"] = tempfile.mkdtemp(prefix="lora-cache-tests-")
# Nor is what they keep any business of the user's home.
os.environ["LORA_CACHE_HOME"] = tempfile.mkdtemp(prefix="lora-cache-tests-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need the Hub server are marked, so that the fast ones can be run without."""
    for item in items:
        if "hub_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.hub)
