"""Fixtures of the whole suite; those of the real engines are in `tests.real.engines.py`."""

pytest_plugins = ["tests.real.engines"]
