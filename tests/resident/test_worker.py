"""A real vLLM, whose slots a scripted manager fills; the tokens are compared with stock vLLM's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from lora_cache.engines.resident.wire import Done, Failed
from tests.resident.asking import (
    FIRST_ID,
    SLOTS,
    attach,
    detach,
    ids,
    prompts,
    request,
    runner_of,
    tokens,
    unleased,
)
from tests.resident.scripted import ScriptedManager, agents, image_of

pytestmark = pytest.mark.vllm


def test_native_until_attached(ours: Any, llm: Any, loras: list[Any]) -> None:
    assert type(runner_of(ours).lora_manager).__name__ == "ResidentLoRAManager"
    assert type(runner_of(llm).lora_manager).__name__ == "LRUCacheWorkerLoRAManager"
    for which in ([0, 1, 2], [3], [1, 4, 3], [5, 0]):
        asked = [loras[number] for number in which]
        assert tokens(ours, asked) == tokens(llm, asked)
        assert ours.llm_engine.list_loras() == llm.llm_engine.list_loras() & set(
            ours.llm_engine.list_loras()
        )
    assert ours.llm_engine.pin_lora(loras[0].lora_int_id)
    runner_of(llm).lora_manager.remove_all_adapters()
    runner_of(ours).lora_manager.remove_all_adapters()


def test_attach_takes_the_native_adapters_slots(
    ours: Any, loras: list[Any], images: dict[int, torch.Tensor]
) -> None:
    ours.llm_engine.add_lora(loras[0])
    with ScriptedManager(images) as scripted:
        attach(ours, scripted)
        assert ours.llm_engine.list_loras() == set()
        with pytest.raises(Exception, match="already has a manager"):
            attach(ours, scripted)
        detach(ours)
    assert ours.llm_engine.add_lora(loras[0])
    assert ours.llm_engine.remove_lora(loras[0].lora_int_id)


def test_attaching_to_nobody_or_in_the_open_changes_nothing(
    ours: Any, loras: list[Any], tmp_path: Path
) -> None:
    ours.llm_engine.add_lora(loras[0])
    for mode, message in ((0o700, "No such file"), (0o755, "yours alone")):
        tmp_path.chmod(mode)
        asked = request(0, tmp_path / "none", lora_name="lora_cache:attach")
        with pytest.raises(Exception, match=message):
            ours.llm_engine.add_lora(asked)
    assert ours.llm_engine.list_loras() == {loras[0].lora_int_id}
    assert agents() == []
    ours.llm_engine.remove_lora(loras[0].lora_int_id)


def test_loaded_by_the_agent_answers_as_natively_loaded(
    ours: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    """Every slot is used twice, with another adapter: what was there before does not matter."""
    adapter_manager = runner_of(ours).lora_manager._adapter_manager
    for which in ([0, 1, 2], [3, 4, 5]):
        held = manager.holding()
        for slot, number in enumerate(which):
            answer = manager.load(FIRST_ID + number, slot, displaces=held[slot])
            assert isinstance(answer, Done)
            assert torch.equal(image_of(adapter_manager, slot), manager.images[FIRST_ID + number])
        assert manager.holding() == ids(*which)
        assert ours.llm_engine.list_loras() == set(ids(*which))
        assert tokens(ours, [loras[number] for number in which]) == stock(which)
    manager.unload(*ids(3, 5, 0))
    assert manager.holding() == [0, FIRST_ID + 4, 0]
    assert unleased(ours) == 0
    assert manager.displaced == []


def test_loads_while_requests_run_change_nobody_s_tokens(
    ours: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    """Eight requests decode 100 tokens on slot 0, while all else is loaded into slots 1 and 2."""
    expected = stock([0] * 8, 100)
    manager.load(FIRST_ID, 0)
    stop, answers = Event(), []

    def load() -> None:
        held = [0, 0, 0]
        number = 0
        while not stop.is_set():
            slot, lora_id = 1 + number % 2, FIRST_ID + 1 + number % 5
            answers.append(manager.load(lora_id, slot, displaces=held[slot]))
            held[slot] = lora_id
            number += 1

    thread = Thread(target=load)
    thread.start()
    try:
        assert tokens(ours, [loras[0]] * 8, 100) == expected
    finally:
        stop.set()
        thread.join()
    assert len(answers) > 50
    assert all(isinstance(answer, Done) for answer in answers)
    assert unleased(ours) == 0


def test_loads_over_a_running_adapter_change_nobody_s_tokens(
    ours: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    """A manager that ignores leases: no step may see its slot half written."""
    expected = stock([0] * 4, 60)
    manager.load(FIRST_ID, 0)
    stop, done = Event(), []

    def load() -> None:
        number = 0
        while not stop.is_set():
            held = manager.holding()
            if FIRST_ID in held:
                number += 1
                lora_id = next(i for i in ids(1, 2, 3, 4, 5) if i not in held)
                slot = held.index(FIRST_ID)
                done.append(manager.load(lora_id, slot, displaces=FIRST_ID))

    thread = Thread(target=load)
    thread.start()
    try:
        assert tokens(ours, [loras[0]] * 4, 60) == expected
    finally:
        stop.set()
        thread.join()
    assert sum(isinstance(answer, Done) for answer in done) > 20
    assert unleased(ours) > 20


def test_published_in_mid_run(
    ours: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    from vllm import SamplingParams

    manager.load(FIRST_ID, 0)
    engine = ours.llm_engine
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request("0", prompts(1)[0], params, lora_request=loras[0])
    found: dict[str, list[int]] = {}
    step = 0
    while engine.has_unfinished_requests():
        if step == 4:
            assert isinstance(manager.load(FIRST_ID + 1, 1), Done)
            engine.add_request("1", prompts(1)[0], params, lora_request=loras[1])
        for output in engine.step():
            found[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
        step += 1
    assert [found["0"]] == stock([0])
    assert [found["1"]] == stock([1])
    assert unleased(ours) == 0


def test_an_unleased_request_is_served_and_reported(
    ours: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    manager.load(FIRST_ID, 0)
    manager.load(FIRST_ID + 1, 1)
    assert tokens(ours, [loras[4]]) == stock([4]), "into the free slot"
    assert tokens(ours, [loras[1]]) == stock([1])
    assert tokens(ours, [loras[3], loras[1]]) == stock([3, 1]), "the idle one goes, slot 0"
    assert manager.holding() == ids(3, 1, 4)
    assert [(d.slot, d.old_id, d.new_id) for d in manager.displaced] == [
        (2, 0, FIRST_ID + 4),
        (0, FIRST_ID, FIRST_ID + 3),
    ]
    assert all(0 < d.seconds < 20 for d in manager.displaced)
    assert unleased(ours) == 2
    assert tokens(ours, [loras[0], loras[2], loras[5]]) == stock([0, 2, 5]), "a whole new batch"
    assert sorted(manager.holding()) == sorted(ids(0, 2, 5))
    answer = manager.load(FIRST_ID + 1, 1, displaces=FIRST_ID + 1)
    assert isinstance(answer, Failed), "the manager is told that it believes what is not so"
    assert "not" in answer.message


def test_a_wrongly_displaced_adapter_comes_back_for_its_request(
    ours: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    """As a row of a finished request would find it: the answer is right, and it is reported."""
    from vllm import SamplingParams

    manager.load(FIRST_ID, 0)
    engine = ours.llm_engine
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request("0", prompts(1)[0], params, lora_request=loras[0])
    for step in range(4):
        engine.step()
        if step == 2:
            assert isinstance(manager.load(FIRST_ID + 1, 0, displaces=FIRST_ID), Done)
    while engine.has_unfinished_requests():
        (output,) = engine.step()
    assert [list(output.outputs[0].token_ids)] == stock([0])
    assert manager.holding() == [*ids(1, 0), 0]
    assert [d.new_id for d in manager.displaced] == ids(0)


def test_a_broken_adapter_displaces_nobody(
    ours: Any, manager: ScriptedManager, tmp_path: Path
) -> None:
    for slot in range(SLOTS):
        manager.load(FIRST_ID + slot, slot)
    broken = request(9, tmp_path / "missing")
    worker = runner_of(ours).lora_manager
    with pytest.raises(Exception, match="missing"):
        worker.set_active_adapters({broken}, None)
    assert manager.holding() == ids(0, 1, 2)
    assert manager.displaced == []


def test_an_image_that_is_none_is_refused(ours: Any, manager: ScriptedManager) -> None:
    manager.load(FIRST_ID, 0)
    for changes in ({"offset": -1}, {"offset": manager.total}, {"nbytes": 1 << 40}, {"nbytes": 0}):
        answer = manager.load(FIRST_ID + 1, 0, displaces=FIRST_ID, **changes)
        assert isinstance(answer, Failed)
        manager.load(FIRST_ID, 0)
    assert isinstance(manager.load(FIRST_ID, 1), Failed), "it is published already"
    assert manager.holding() == [FIRST_ID, 0, 0]


def test_dropping_all_adapters_is_done_and_reported(
    ours: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    """vLLM does so when the weights of the base model are replaced."""
    manager.load(FIRST_ID, 0)
    runner_of(ours).reset_lora_state()
    assert manager.holding() == [0, 0, 0]
    assert [(d.old_id, d.new_id) for d in manager.displaced] == [(FIRST_ID, 0)]
    assert isinstance(manager.load(FIRST_ID, 1), Done)
    assert tokens(ours, [loras[0]]) == stock([0])


def test_others_use_vllm_s_api(ours: Any, manager: ScriptedManager, loras: list[Any]) -> None:
    engine = ours.llm_engine
    manager.load(FIRST_ID, 0)
    manager.load(FIRST_ID + 1, 1)
    assert engine.add_lora(loras[0]), "it is here"
    assert engine.add_lora(loras[5]), "there is a free slot"
    assert engine.list_loras() == set(ids(0, 1, 5))
    inplace = request(5, loras[5].lora_path, load_inplace=True)
    for refused, argument, message in (
        (engine.add_lora, loras[3], "none is free"),
        (engine.add_lora, inplace, "new id"),
        (engine.pin_lora, FIRST_ID, "pin with lora_cache"),
        (engine.remove_lora, FIRST_ID, "unload with lora_cache"),
    ):
        with pytest.raises(Exception, match=message):
            refused(argument)
    assert engine.list_loras() == set(ids(0, 1, 5))
    assert engine.remove_lora(FIRST_ID + 5)
    assert not engine.remove_lora(FIRST_ID + 4)
    assert manager.holding() == [*ids(0, 1), 0]
    assert [(d.old_id, d.new_id) for d in manager.displaced] == [
        (0, FIRST_ID + 5),
        (FIRST_ID + 5, 0),
    ]


def lost(manager: ScriptedManager) -> None:
    assert manager.channel
    manager.channel.close()


@pytest.mark.parametrize("way", [lost, ScriptedManager.bye])
def test_without_its_manager_the_engine_is_native_again(
    ours: Any,
    images: dict[int, torch.Tensor],
    loras: list[Any],
    stock: Any,
    way: Callable[[ScriptedManager], None],
) -> None:
    from vllm import SamplingParams

    engine = ours.llm_engine
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with ScriptedManager(images) as scripted:
        attach(ours, scripted)
        scripted.load(FIRST_ID, 0)
        engine.add_request("0", prompts(1)[0], params, lora_request=loras[0])
        for _ in range(4):
            engine.step()
        way(scripted)
        deadline = time.monotonic() + 5
        while agents() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert agents() == []
        while engine.has_unfinished_requests():
            (output,) = engine.step()
    assert [list(output.outputs[0].token_ids)] == stock([0])
    assert runner_of(ours).lora_manager._agent is None
    assert engine.list_loras() == {FIRST_ID}, "loaded natively, for the request that ran on"
    assert tokens(ours, [loras[1], loras[2], loras[3]]) == stock([1, 2, 3])
    runner_of(ours).lora_manager.remove_all_adapters()
