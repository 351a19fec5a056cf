"""Fixtures of the whole suite; also `tests/{real,resident}/engines.py`, `tests/hub/fixtures.py`."""

import os
import tempfile

import pytest

pytest_plugins = ["tests.real.engines", "tests.resident.engines", "tests.hub.fixtures"]

# Caches that tests open are no business of `lora-cache status`.
os.environ["LORA_CACHE_STATUS_DIR"] = tempfile.mkdtemp(prefix="lora-cache-tests-")


#: Engines that tests share.
ENGINES = {"llm", "async_llm", "resident_llm", "resident_async_llm", "ours", "rig", "bench"}


@pytest.hookimpl(tryfirst=True)  # xdist looks at the marks in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need the Hub server, and deal all tests to two lanes (``make test``).

    Those that share engines are one lane, so that each engine is started once.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "hub_server" in fixtures:
            item.add_marker(pytest.mark.hub)
        lane = "engines" if fixtures & ENGINES else "others"
        item.add_marker(pytest.mark.xdist_group(lane))
