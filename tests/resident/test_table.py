"""Who may change a slot when: the table and the clock, without vLLM."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from lora_cache.engines.resident.steps import StepClock, watch
from lora_cache.engines.resident.table import SlotTable, SlotTakenError, StoppedError


def put(table: SlotTable, slot: int, lora_id: int, displaces: int = 0) -> None:
    hold = table.take(slot, displaces)
    assert table.begin_writing(hold)
    table.publish(hold, lora_id)


def test_what_is_held_is_not_published() -> None:
    table = SlotTable(2)
    put(table, 0, 7)
    hold = table.take(0, 7)
    assert table.ids() == [0, 0]
    table.release(hold)
    assert table.ids() == [0, 0]
    with pytest.raises(SlotTakenError, match="slot 0 holds nothing, not 7"):
        table.take(0, 7)
    with pytest.raises(SlotTakenError, match="no slot 2"):
        table.take(2, 0)


def test_an_adapter_is_published_once() -> None:
    table = SlotTable(2)
    hold = table.take(0, 0)
    table.begin_writing(hold)
    put(table, 1, 7)
    with pytest.raises(SlotTakenError, match="in slot 1 already"):
        table.publish(hold, 7)
    assert table.ids() == [0, 7]
    put(table, 0, 8)


def test_what_a_batch_has_needed_a_moment_ago() -> None:
    table = SlotTable(3)
    put(table, 0, 7)
    put(table, 1, 8)
    assert table.recent(1e9) == [], "no batch yet"
    table.prepare([7], step=1)
    table.prepared()
    assert table.recent(1e9) == [7]
    time.sleep(0.01)
    assert table.recent(0.001) == []
    put(table, 0, 9, displaces=7)
    assert table.recent(1e9) == [], "what its slot held was"


def test_the_agent_waits_for_a_batch_that_is_being_prepared() -> None:
    stop = threading.Event()
    table = SlotTable(1, stop.is_set)
    put(table, 0, 7)
    assert table.prepare([7], step=5) == []
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.append(table.take(0, 7).last_used_step))
    thread.start()
    time.sleep(0.1)
    assert taken == []
    table.prepared()
    thread.join(5)
    assert taken == [5], "and it must wait for the step of that batch"
    stop.set()
    with pytest.raises(StoppedError):
        table.take(0, 0)


def test_a_slot_not_yet_written_is_called_back_by_who_needs_its_adapter() -> None:
    table = SlotTable(1)
    put(table, 0, 7)
    hold = table.take(0, 7)
    assert table.prepare([7], step=6) == []
    assert table.ids() == [7]
    assert not table.begin_writing(hold)
    table.release(hold)
    assert table.ids() == [7]


def test_a_slot_being_written_is_not_called_back() -> None:
    table = SlotTable(2)
    put(table, 0, 7)
    put(table, 1, 8)
    hold = table.take(0, 7)
    table.begin_writing(hold)
    assert table.prepare([7], step=6) == [7]
    mine = table.reserve(6)
    assert mine is not None
    assert (mine.slot, mine.old_id) == (1, 8), "the idle one, not the one that is being written"
    table.publish(mine, 7)
    table.prepared()
    table.publish(hold, 9)
    assert table.ids() == [9, 7]


def test_a_reservation_is_free_then_idle_then_called_back_never_of_the_batch() -> None:
    table = SlotTable(3)
    put(table, 0, 7)
    put(table, 1, 8)
    table.prepare([8], step=1)
    table.prepare([7], step=2)
    found = []
    for new in (20, 21):
        table.prepare([7, 20, 21], step=3)
        hold = table.reserve(3)
        assert hold is not None
        found.append((hold.slot, hold.old_id))
        table.publish(hold, new)
    assert found == [(2, 0), (1, 8)]
    assert table.prepare([7, 20, 21], step=3) == []
    assert table.reserve(3) is None
    table.prepared()
    waiting = table.take(0, 7)
    table.prepare([20, 21, 22], step=4)
    hold = table.reserve(4)
    assert hold is not None
    assert (hold.slot, hold.old_id) == (0, 7)
    assert not table.begin_writing(waiting)


def test_the_step_thread_waits_for_a_write_if_it_is_the_only_candidate() -> None:
    table = SlotTable(1)
    hold = table.take(0, 0)
    table.begin_writing(hold)
    threading.Timer(0.1, table.publish, (hold, 7)).start()
    assert table.prepare([9], step=1) == [9]
    mine = table.reserve(1)
    assert mine is not None
    assert mine.old_id == 7


class Device:
    """Events that a test completes by hand."""

    def __init__(self) -> None:
        self.done: list[threading.Event] = []

    def record(self) -> object:
        event = threading.Event()
        self.done.append(event)
        return lambda: event.wait(5)


def waited(clock: StepClock, step: int) -> threading.Thread:
    thread = threading.Thread(target=clock.wait, args=(step,))
    thread.start()
    thread.join(0.1)
    return thread


def test_the_clock_waits_for_launch_and_device() -> None:
    device = Device()
    clock = StepClock(device.record)  # type: ignore[arg-type]
    clock.start()
    device.done[0].set()
    runner = SimpleNamespace(
        execute_model=lambda tokens: "output" if tokens == 0 else None,
        sample_tokens=lambda: "tokens",
    )
    watch(runner, clock)
    runner.execute_model(1)
    assert clock.current == 1
    thread = waited(clock, 1)
    assert thread.is_alive(), "its sampling reads the slots too, and is not launched"
    assert runner.sample_tokens() == "tokens"
    thread.join(0.1)
    assert thread.is_alive(), "launched, but the device is not done"
    device.done[1].set()
    thread.join(5)
    assert not thread.is_alive()
    runner.execute_model(0)
    assert len(device.done) == 3, "nothing is sampled after an output"
    runner.execute_model(1)
    runner.execute_model(1)
    assert len(device.done) == 4, "a step that nobody sampled ends where the next begins"


def test_a_failing_step_ends() -> None:
    clock = StepClock()

    def fail() -> None:
        raise MemoryError

    runner = SimpleNamespace(execute_model=fail, pool=fail)
    watch(runner, clock)
    with pytest.raises(MemoryError):
        runner.execute_model()
    clock.wait(1)


def test_waiting_ends_when_told_to() -> None:
    clock = StepClock()
    clock.begin()
    with pytest.raises(StoppedError):
        clock.wait(1, lambda: True)
