"""What kills or stalls stock vLLM, shown on it first where that is cheap, and here does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_cache.engines.resident.wire import Displaced
from tests.real.parts import write_adapter
from tests.resident.asking import FIRST_ID, SLOTS, ids, request, runner_of, slot_index
from tests.resident.scripted import ScriptedManager

pytestmark = pytest.mark.vllm


def test_out_of_band_loading_evicts_what_is_used(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any]
) -> None:
    for slot in range(SLOTS):
        llm.llm_engine.add_lora(loras[slot])
        manager.load(FIRST_ID + slot, slot)
    llm.llm_engine.add_lora(loras[3])
    assert FIRST_ID not in slot_index(llm)
    with pytest.raises(Exception, match="none is free"):
        ours.llm_engine.add_lora(loras[3])
    assert manager.holding() == ids(0, 1, 2)
    runner_of(llm).lora_manager.remove_all_adapters()


def test_a_full_batch_beside_an_idle_pin_loses_a_member(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any]
) -> None:
    llm.llm_engine.add_lora(loras[0])
    llm.llm_engine.pin_lora(FIRST_ID)
    batch = set(loras[1:4])
    runner_of(llm).lora_manager.set_active_adapters(batch, None)
    assert not set(ids(1, 2, 3)) <= set(slot_index(llm)), "the step would end in a KeyError"
    runner_of(llm).lora_manager.remove_all_adapters()

    manager.load(FIRST_ID, 0)
    with pytest.raises(Exception, match="pin with lora_cache"):
        ours.llm_engine.pin_lora(FIRST_ID)
    runner_of(ours).lora_manager.set_active_adapters(batch, None)
    assert set(slot_index(ours)) == set(ids(1, 2, 3))


def test_removing_what_is_used(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any], tmp_path: Path
) -> None:
    """Stock reads it again from disk at the next step, and dies if it is not there."""
    gone = request(20, write_adapter(tmp_path / "gone", seed=1))
    llm.llm_engine.add_lora(gone)
    (tmp_path / "gone" / "adapter_config.json").unlink()
    llm.llm_engine.remove_lora(gone.lora_int_id)
    with pytest.raises(Exception, match="gone"):
        runner_of(llm).lora_manager.set_active_adapters({gone}, None)
    manager.load(FIRST_ID, 0)
    moved = request(0, tmp_path / "gone", lora_name="a0")
    with pytest.raises(Exception, match="unload with lora_cache"):
        ours.llm_engine.remove_lora(FIRST_ID)
    runner_of(ours).lora_manager.set_active_adapters({moved}, None)
    assert manager.holding() == [FIRST_ID, 0, 0]


def test_a_failing_activation_leaves_no_half_written_slot_published(
    ours: Any, manager: ScriptedManager, loras: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot in range(SLOTS):
        manager.load(FIRST_ID + slot, slot)
    adapter_manager = runner_of(ours).lora_manager._adapter_manager
    last = list(adapter_manager.modules.values())[-1]

    def fail(*_: Any) -> None:
        raise MemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr(last, "set_lora", fail)
        patch.setattr(last, "reset_lora", fail)
        with pytest.raises(MemoryError):
            runner_of(ours).lora_manager.set_active_adapters({loras[3]}, None)
    assert sorted(manager.holding())[0] == 0
    assert manager.holding().count(0) == 1
    assert [isinstance(d, Displaced) and d.new_id for d in manager.displaced] == [0]
