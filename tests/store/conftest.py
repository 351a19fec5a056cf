"""Time is short in tests."""

from __future__ import annotations

import pytest

from lora_cache.sources import patience


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.005)
