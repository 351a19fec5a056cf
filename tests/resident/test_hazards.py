"""What kills, stalls or fools stock vLLM: shown on it first, and then that it does not happen here.

What a step does first is `set_active_adapters`; tests that call it see what the step would see, and
leave the engine alive.

| hazard of stock vLLM | shown by |
| --- | --- |
| an idle pin beside a full batch: one is evicted, the step dies | `test_a_full_batch_…` |
| every slot pinned, and another request: the step dies | `test_every_slot_pinned_…` |
| removed in use: read from disk again, or the step dies | `test_removing_…` |
| what leaves the CPU tier leaves its slot, too | `test_leaving_host_memory_…` |
| `add_lora` from elsewhere evicts what is in use | `test_out_of_band_…` |
| `execute_dummy_batch` removes every adapter, pinned ones too | `test_dummy_batches_…` |
| `reload_weights` removes every adapter | `test_new_base_weights_…` |
| two ids under one name in a batch: the step dies | `test_two_ids_…` |
| `load_inplace` drops the pin, and reads from disk at every step | `test_loading_in_place_…` |
| a write that fails leaves the slot marked as good | `test_a_failing_activation_…` |
| unloading over HTTP never tells the engine | `test_serve.py` |
| younger requests overtake one that the scheduler skips, for ever | not shown: see below |

The scheduler skips a waiting request whose adapter is one too many for the batch.  That would take
a random trace of minutes to show.  A lease is only given for an adapter that is in a slot, so no
leased request is ever skipped, and who waits for a lease waits in order: that is the planner's,
and shown by `tests/planner/test_fairness.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.real.parts import write_adapter
from tests.real.test_stock_engine import greedy, prompt
from tests.resident.asking import (
    FIRST_ID,
    SLOTS,
    ids,
    request,
    runner_of,
    slot_index,
    tokens,
    unleased,
)
from tests.resident.scripted import ScriptedManager
from tests.resident.test_engine import answer, cache_of, run, stock_answer

pytestmark = pytest.mark.vllm


def worker_of(llm: Any) -> Any:
    return runner_of(llm).lora_manager


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to stock vLLM, the next one finds it without adapters."""
    yield
    if "llm" in request.fixturenames:
        worker_of(request.getfixturevalue("llm")).remove_all_adapters()


def dies(llm: Any, loras: list[Any]) -> BaseException:
    """Ask, and see the step fail; the requests that it leaves behind are cleared away."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is that kills it
        tokens(llm, loras)
    processor = llm.llm_engine.output_processor
    assert processor.request_states, "in a process of its own the engine would be dead"
    llm.llm_engine.abort_request(list(processor.request_states), internal=True)
    return caught.value


@contextmanager
def counting_reads(llm: Any) -> Iterator[list[int]]:
    """The ids of the adapters that vLLM reads from disk, as it reads them."""
    worker, read = worker_of(llm), []
    load = worker._load_adapter

    def counted(lora: Any) -> Any:
        read.append(lora.lora_int_id)
        return load(lora)

    worker._load_adapter = counted
    try:
        yield read
    finally:
        del worker._load_adapter


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


def test_a_full_batch_beside_an_idle_pin_loses_a_member(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    expected = stock([1, 2, 3])
    llm.llm_engine.add_lora(loras[0])
    llm.llm_engine.pin_lora(FIRST_ID)
    assert isinstance(dies(llm, loras[1:4]), KeyError)

    manager.load(FIRST_ID, 0)
    with pytest.raises(Exception, match="pin with lora_cache"):
        ours.llm_engine.pin_lora(FIRST_ID)
    assert tokens(ours, loras[1:4]) == expected


def test_every_slot_pinned_and_another_request(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    """Here a pin is the planner's, and it leaves a slot: `PinnedError` (`tests/planner`)."""
    expected = stock([3])
    for slot in range(SLOTS):
        llm.llm_engine.add_lora(loras[slot])
        llm.llm_engine.pin_lora(FIRST_ID + slot)
        manager.load(FIRST_ID + slot, slot)
        with pytest.raises(Exception, match="pin with lora_cache"):
            ours.llm_engine.pin_lora(FIRST_ID + slot)
    assert "All items are pinned" in str(dies(llm, [loras[3]]))
    assert tokens(ours, [loras[3]]) == expected
    assert unleased(ours) == 1, "nobody had leased it"


def test_removing_what_is_used(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any], tmp_path: Path
) -> None:
    """Stock reads it again from disk at the next step, and dies if it is not there."""
    gone = request(20, write_adapter(tmp_path / "gone", seed=1))
    llm.llm_engine.add_lora(gone)
    (tmp_path / "gone" / "adapter_config.json").unlink()
    llm.llm_engine.remove_lora(gone.lora_int_id)
    assert "gone" in str(dies(llm, [gone]))

    manager.load(FIRST_ID, 0)
    moved = request(0, tmp_path / "gone", lora_name="a0")
    with pytest.raises(Exception, match="unload with lora_cache"):
        ours.llm_engine.remove_lora(FIRST_ID)
    worker_of(ours).set_active_adapters({moved}, None)
    assert manager.holding() == [FIRST_ID, 0, 0]


def test_leaving_host_memory_is_leaving_the_slot(
    llm: Any, resident_llm: Any, loras: list[Any], adapters: list[Path]
) -> None:
    """vLLM makes room in its CPU tier with `remove_oldest_adapter`."""
    llm.llm_engine.add_lora(loras[0])
    assert FIRST_ID in slot_index(llm)
    worker_of(llm)._adapter_manager.remove_oldest_adapter()
    assert FIRST_ID not in slot_index(llm)

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            first = await answer(cache, adapters[0])
            (resident,) = cache._engine.slots().values()
            for path in adapters[1:]:  # eleven through host memory, which has room for six
                await cache.prefetch(path)
            assert cache.stats().host_evictions > SLOTS
            assert resident in cache._engine.slots().values()
            before = unleased(resident_llm)
            assert await answer(cache, adapters[0]) == first
            assert unleased(resident_llm) == before
            assert await cache.reconcile() == 0

    run(main())


def test_dummy_batches_leave_the_slots_alone(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    """Idle data-parallel ranks run them."""
    expected = stock([0, 1, 2])
    llm.llm_engine.add_lora(loras[0])
    llm.llm_engine.pin_lora(FIRST_ID)
    llm.llm_engine.engine_core.engine_core.execute_dummy_batch()
    assert llm.llm_engine.list_loras() == set()

    for slot in range(SLOTS):
        manager.load(FIRST_ID + slot, slot)
    ours.llm_engine.engine_core.engine_core.execute_dummy_batch()
    runner_of(ours)._dummy_run(4, uniform_decode=True, num_active_loras=SLOTS)
    assert manager.holding() == ids(0, 1, 2)
    assert ours.llm_engine.list_loras() == set(ids(0, 1, 2))
    assert tokens(ours, loras[:3]) == expected
    assert unleased(ours) == 0


def test_new_base_weights_drop_everything_and_it_comes_back(
    llm: Any, resident_llm: Any, loras: list[Any], adapters: list[Path]
) -> None:
    """vLLM drops all adapters with the old weights.  Here the cache is told, and repairs it."""
    for weight in runner_of(llm).model.parameters():
        if weight.is_meta or not weight.numel():
            pytest.skip("vLLM has packed its weights for this CPU, and cannot read them anew")
    expected = [stock_answer(llm, path, 30 + n) for n, path in enumerate(adapters[:4])]
    llm.llm_engine.add_lora(loras[0])
    llm.llm_engine.pin_lora(FIRST_ID)
    llm.collective_rpc("reload_weights")
    assert llm.llm_engine.list_loras() == set()

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            engine: Any = cache._engine
            await cache.pin(adapters[1])
            stream = cache.generate(prompt(4), greedy(12), adapters[0])
            for _ in range(3):
                await anext(stream)
            resident_llm.collective_rpc("reload_weights")
            assert resident_llm.llm_engine.list_loras() == set()
            outputs = [output async for output in stream]
            assert list(outputs[-1].outputs[0].token_ids) == expected[0]
            await asyncio.sleep(0.6)  # the cache is told, and looks
            assert engine.displaced >= 2
            assert cache.stats().drift >= 1
            held = {key.name for key in engine.slots().values()}
            assert adapters[1].name in held, "a pin holds"
            assert [await answer(cache, path) for path in adapters[:4]] == expected
            assert await cache.reconcile() == 0

    run(main())


def test_two_ids_under_one_name(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    """For vLLM two requests of one name are one.  Of ours no two names are alike: they carry the
    digest of what the adapter is.  Who goes past the cache can have it here, too, unless both are
    in slots already: where they are is looked up by id.
    """
    one, two = (
        request(n, Path(loras[n].lora_path), lora_name="same") for n in (0, 1)
    )  # fmt: skip
    assert isinstance(dies(llm, [one, two]), KeyError)
    assert isinstance(dies(ours, [one, two]), KeyError)
    for lora_id in ours.llm_engine.list_loras():
        ours.llm_engine.remove_lora(lora_id)

    expected = stock([0, 1])
    manager.load(FIRST_ID, 0)
    manager.load(FIRST_ID + 1, 1)
    assert tokens(ours, [one, two]) == expected


def test_loading_in_place_is_refused(
    ours: Any, llm: Any, manager: ScriptedManager, loras: list[Any], stock: Any
) -> None:
    expected = stock([0])
    again = request(0, Path(loras[0].lora_path), load_inplace=True)
    llm.llm_engine.add_lora(loras[0])
    llm.llm_engine.pin_lora(FIRST_ID)
    pinned = worker_of(llm)._adapter_manager._active_adapters.pinned_items
    assert FIRST_ID in pinned
    with counting_reads(llm) as read:
        llm.llm_engine.add_lora(again)
        assert FIRST_ID not in pinned
        assert tokens(llm, [again]) == expected
        assert len(read) == 1 + 12, "one of twelve tokens, each after reading it from disk"

    manager.load(FIRST_ID, 0)
    with counting_reads(ours) as read:
        with pytest.raises(Exception, match="a new version under a new id"):
            ours.llm_engine.add_lora(again)
        assert tokens(ours, [again]) == expected, "it is in a slot, and stays as it is there"
        assert read == []
    assert manager.holding() == [FIRST_ID, 0, 0]
    assert unleased(ours) == 0


def test_a_failing_activation_leaves_no_half_written_slot_published(
    ours: Any,
    llm: Any,
    manager: ScriptedManager,
    loras: list[Any],
    stock: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = stock([3])
    for slot in range(SLOTS):
        manager.load(FIRST_ID + slot, slot)

    def fail(*_: Any) -> None:
        raise MemoryError("no")

    for engine in (llm, ours):
        last = list(worker_of(engine)._adapter_manager.modules.values())[-1]
        with monkeypatch.context() as patch:
            patch.setattr(last, "set_lora", fail)
            patch.setattr(last, "reset_lora", fail)
            with pytest.raises(MemoryError):
                worker_of(engine).set_active_adapters({loras[3]}, None)
    assert FIRST_ID + 3 in slot_index(llm), "it will be used as it is"
    assert sorted(manager.holding())[0] == 0
    assert manager.holding().count(0) == 1
    assert [change.new_id for change in manager.displaced] == [0]
    assert tokens(ours, [loras[3]]) == expected
