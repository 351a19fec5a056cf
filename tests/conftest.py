"""Fixtures of the whole suite; those of the real engines are in `tests/real/engines.py`."""

import os
import tempfile

pytest_plugins = ["tests.real.engines"]

# Caches that tests open are no business of `lora-cache status`.
os.environ["LORA_CACHE_STATUS_DIR"] = tempfile.mkdtemp(prefix="lora-cache-tests-")
