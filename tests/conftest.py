"""Fixtures of the whole suite; also `tests/real/engines.py`, `tests/hub/fixtures.py`."""

import os
import tempfile

pytest_plugins = ["tests.real.engines", "tests.hub.fixtures"]

# Caches that tests open are no business of `lora-cache status`.
os.environ["LORA_CACHE_STATUS_DIR"] = tempfile.mkdtemp(prefix="lora-cache-tests-")
