"""Why this victim: the event of an eviction, and `Snapshot.why`."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from lora_cache import Eviction, Tier
from lora_cache.events import Event
from lora_cache.planner import Limits, Planner, Start
from lora_cache.policies import FIFO, LRU
from lora_cache.testing import RandomPolicy
from tests.planner.driver import Driver, key_of
from tests.test_cache import ref, run, world


def test_the_event_says_why_this_victim_and_who_was_next() -> None:
    seen: list[Event] = []

    async def main() -> None:
        async with world(2, 4, policy="lru") as w:
            end = w.cache.subscribe(seen.append)
            for name in ("a", "b", "a"):
                await w.ask(name)
                await w.clock.advance(10.0)
            await w.ask("c")
            end()
            await w.ask("d")
            assert [str(e) for e in w.cache.snapshot().evictions[1:]] == [str(e) for e in seen]

    run(main())
    (event,) = seen
    assert isinstance(event, Eviction)
    assert event.newcomer is not None
    assert (event.victim.name, event.newcomer.name, event.tier) == ("b", "c", Tier.GPU)
    assert event.reason.startswith("last used 20")
    assert event.runner_up is not None
    assert event.runner_up.name == "a"
    assert event.runner_up_reason.startswith("last used 10")
    assert "left its slot for c" in str(event)
    assert "next would have been a" in str(event)


def test_who_is_in_use_is_never_the_runner_up() -> None:
    async def main() -> None:
        async with world(2, 4, policy="lru") as w:
            await w.ask("b")
            async with w.cache.lease(ref("a")):
                await w.ask("c")
                (event,) = w.cache.snapshot().evictions
                assert event.victim.name == "b"
                assert event.runner_up is None
                assert "nobody else could leave" in str(event)
                why = w.cache.snapshot().why("a")
                assert "leased" in why
                assert "number" not in why

    run(main())


def test_host_memory_has_events_of_its_own() -> None:
    async def main() -> None:
        async with world(1, 2, policy="lru") as w:
            for name in ("a", "b", "c"):
                await w.ask(name)
            events = w.cache.snapshot().evictions
            assert [(e.tier, e.victim.name) for e in events] == [
                (Tier.GPU, "b"),
                (Tier.HOST, "a"),  # before: c was read first
                (Tier.GPU, "a"),
            ]
            assert w.cache.stats().evictions == 3

    run(main())


def test_an_unload_is_no_eviction() -> None:
    async def main() -> None:
        async with world() as w:
            await w.ask("a")
            await w.cache.unload(ref("a"))
            assert w.cache.snapshot().evictions == ()

    run(main())


def test_a_failed_load_evicts_nobody() -> None:
    async def main() -> None:
        async with world(1, 4) as w:
            await w.ask("a")
            w.engine.fail_next("b")
            with pytest.raises(Exception, match="b"):
                await w.ask("b")
            assert w.cache.snapshot().evictions == ()

    run(main())


def test_why_tells_where_it_is_what_holds_it_and_what_took_it_away() -> None:
    async def main() -> None:
        async with world(2, 3, policy="lru") as w:
            for name in ("a", "b", "c"):
                await w.ask(name)
                await w.clock.advance(1.0)
            await w.cache.pin(ref("c"))
            shot = w.cache.snapshot()
            assert "is in slot 1, number 1 to leave: last used 2 s ago" in shot.why("b")
            assert "pinned in gpu" in shot.why("c")
            a = shot.why("a")
            assert "is in host memory, number 1 to leave" in a
            assert "1 s ago" in a
            assert "left its slot for c" in a
            (row,) = [row for row in shot.adapters if row.name == "a"]
            assert shot.why(row.key).removeprefix(row.key) == a.removeprefix("a")
            await w.ask("d")
            shot = w.cache.snapshot()
            assert "is not resident" in shot.why("a")
            assert "left host memory" in shot.why("a")
            assert shot.why("who") == "who is not resident, and nobody waits for it"

    run(main())


def test_places_are_the_order_in_which_copies_will_leave() -> None:
    async def main() -> None:
        async with world(2, 4, policy="lru") as w:
            for name in ("a", "b", "c", "d"):
                await w.ask(name)
            for name in ("e", "f"):
                rows = w.cache.snapshot().adapters
                first = {row.name for row in rows if row.place == 1}
                await w.ask(name)
                gone = {e.victim.name for e in w.cache.snapshot().evictions[:2]}
                assert gone == first

    run(main())


def test_a_listener_that_fails_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("broken")

    seen: list[Event] = []

    async def main() -> None:
        async with world(1, 2) as w:
            end = w.cache.subscribe(fail)
            w.cache.subscribe(seen.append)
            await w.ask("a")
            await w.ask("b")
            end()
            end()  # once is enough, twice is fine

    with caplog.at_level(logging.ERROR):
        run(main())
    assert len(seen) == 1
    assert "a listener failed" in caplog.text


def test_the_snapshot_is_json() -> None:
    async def main() -> None:
        async with world(1, 2) as w:
            await w.ask("a")
            await w.ask("b")
            (event,) = json.loads(json.dumps(w.cache.snapshot().to_dict()))["evictions"]
            assert event["victim_name"] == "a"
            assert event["tier"] == "gpu"

    run(main())


# ---------------------------------------------------------------------- in the planner


def test_giving_reasons_changes_no_decision() -> None:
    def play(*, explains: bool) -> list[Any]:
        driver = Driver(Limits(2, 4), FIFO, RandomPolicy)
        driver.planner = Planner(Limits(2, 4), FIFO(), RandomPolicy(), explains=explains)
        out: list[Any] = []
        for number in [0, 1, 2, 0, 3, 4, 1, 5, 0]:
            driver.use(number)
            out.append(
                sorted(map(str, driver.planner.residency.gpu.copies))
                + sorted(map(str, driver.planner.residency.host.copies))
            )
        return out

    assert play(explains=True) == play(explains=False)


class _Costs(LRU):
    def __init__(self) -> None:
        super().__init__()
        self.costs: list[float] = []

    def on_insert(self, key: Any, nbytes: int, cost_s: float, now: float) -> None:
        self.costs.append(cost_s)
        super().on_insert(key, nbytes, cost_s, now)


def test_what_is_read_first_tells_what_each_step_is_worth() -> None:
    gpu, host = _Costs(), _Costs()
    planner = Planner(Limits(1, 4), gpu, host)
    (read,) = planner.acquire(1, key_of(0), 1, 0.0)
    assert isinstance(read, Start)
    (written,) = planner.completed(read.transition.op, 0.2, 0.0)
    assert isinstance(written, Start)
    planner.completed(written.transition.op, 0.016, 0.0)
    assert (gpu.costs, host.costs) == ([0.016], [0.2])


def test_a_slot_is_worth_the_way_back_from_host_memory() -> None:
    gpu, host = _Costs(), _Costs()
    planner = Planner(Limits(1, 4, stages_without_slot=False), gpu, host)

    def ask(ticket: int, number: int, cost_s: float) -> None:
        (start,) = planner.acquire(ticket, key_of(number), 1, 0.0)
        assert isinstance(start, Start)
        planner.completed(start.transition.op, cost_s, 0.0)
        planner.release(ticket, 0.0)

    ask(1, 0, 0.2)  # from disk: nobody knows yet what the second hop takes
    ask(2, 1, 0.2)
    ask(3, 0, 0.016)  # from host memory
    ask(4, 2, 0.2)
    assert gpu.costs == [0.2, 0.2, 0.016, 0.016]
    assert host.costs == [0.2, 0.2, 0.2]
