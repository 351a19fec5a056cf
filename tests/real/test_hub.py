"""From the Hub to a real vLLM's answer, and again when there is no Hub any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cache.errors import AdapterNotFoundError, SourceError
from tests.hub.files import files_of
from tests.hub.fixtures import Hub
from tests.real.engines import ALIVE, engine_arguments
from tests.real.parts import write_adapter
from tests.real.test_llm import greedy, prompts, texts

pytestmark = pytest.mark.vllm


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Callable[[], Any]:
    """Starts an `LLM`; all of them have one store."""

    def started() -> Any:
        from lora_cache import LLM

        arguments = engine_arguments(tiny_model, max_loras=2, max_cpu_loras=4)
        ALIVE.append(LLM(arguments.pop("model"), disk_dir=tmp_path / "store", **arguments))
        return ALIVE[-1]

    return started


def answers(llm: Any, adapter: Any) -> list[list[int]]:
    return texts(llm.generate(prompts(4), greedy(), lora_request=adapter, use_tqdm=False))


def test_from_the_hub_to_an_answer_and_again_without_a_hub(
    hub: Hub,
    start: Callable[[], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.proxy.like_the_hub()
    local = write_adapter(tmp_path / "local", seed=5)
    commit = hub.repos.create(sql := hub.name("sql"), files_of(local))
    llm = start()
    base = answers(llm, None)
    cold = answers(llm, sql)
    assert cold == answers(llm, str(local)) != base
    (row,) = [row for row in llm.snapshot().adapters if row.name == "sql"]
    assert row.key == f"hub:{sql}@{commit}"
    assert not hub.cache_dir.exists(), "the user's own cache is left alone"
    with pytest.raises(AdapterNotFoundError, match="is not on the Hub"):
        answers(llm, hub.name("missing"))

    asked = len(hub.proxy.requests)
    assert answers(llm, sql) == cold
    assert len(hub.proxy.requests) == asked, "what is resident asks nobody"

    hub.proxy.stop()
    llm = start()
    caplog.clear()
    assert answers(llm, sql) == cold
    (warning,) = [record for record in caplog.records if record.name == "lora_cache.catalog"]
    assert warning.levelname == "WARNING"
    assert f"using hub:{sql}@{commit}, which it meant last" in warning.getMessage()
    with pytest.raises(SourceError, match="answer"):
        answers(llm, hub.name("other"))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    llm = start()
    caplog.clear()
    assert answers(llm, sql) == cold
    assert "HF_HUB_OFFLINE is set; using" in caplog.text
    caplog.clear()
    assert answers(llm, f"{sql}@{commit}") == cold
    assert caplog.text == "", "a commit need not be looked up"
    assert llm.reconcile() == 0
