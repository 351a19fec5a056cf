"""Any order of events: what is held stays, what is found is whole, the budget holds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_cache.adapter import AdapterKey
from lora_cache.errors import DiskFullError
from lora_cache.store import Store
from lora_cache.store.locks import Hold
from tests.hub.files import CONFIG, WEIGHTS
from tests.store.parts import bring, content_of, files_named, key_of

NAMES = st.sampled_from(["a0", "a1", "a2", "a3", "a4", "a5"])
SIZE = sum(map(len, files_named("a0").values()))
SIZES = st.sampled_from([4_000, 12_000, 20_000])
BUDGET = 6 * SIZE


class BrokeOffError(Exception):
    pass


def break_off(partial: Path) -> None:
    (partial / WEIGHTS).write_bytes(b"some")
    raise BrokeOffError


class StoreMachine(RuleBasedStateMachine):
    """Two stores on one directory, as two processes would have them."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="lora-cache-store-"))
        self.stores = [Store(self.root, max_bytes=BUDGET) for _ in range(2)]
        self.held: dict[AdapterKey, tuple[Path, dict[str, bytes], list[Hold]]] = {}
        self.sizes: dict[str, int] = {}

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.root)

    @rule(number=st.integers(0, 1), name=NAMES, nbytes=SIZES, breaks=st.booleans())
    def pull(self, number: int, name: str, nbytes: int, breaks: bool) -> None:
        store = self.stores[number]
        nbytes = self.sizes.setdefault(name, nbytes)  # content never changes
        held = sum(sum(map(len, files.values())) for _, files, _ in self.held.values())
        size = sum(map(len, files_named(name, nbytes).values()))
        try:
            adapter = bring(store, name, nbytes, break_off if breaks else None)
        except BrokeOffError:
            assert breaks
        except DiskFullError:
            assert held + size > BUDGET
        else:
            assert content_of(adapter) == files_named(name, nbytes)

    @rule(number=st.integers(0, 1), name=NAMES)
    def find(self, number: int, name: str) -> None:
        adapter = self.stores[number].find(key_of(name))
        if adapter is not None:
            assert content_of(adapter) == files_named(name, self.sizes[name])

    @rule(number=st.integers(0, 1), name=NAMES)
    def hold(self, number: int, name: str) -> None:
        store = self.stores[number]
        if (adapter := store.find(key_of(name))) is not None:
            hold = store.hold(adapter)
            assert hold is not None
            held = self.held.setdefault(adapter.key, (adapter.path, content_of(adapter), []))
            held[2].append(hold)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.held, key=str)))
        holds = self.held[key][2]
        holds.pop().release()
        if not holds:
            del self.held[key]

    @rule(number=st.integers(0, 1), name=NAMES)
    def remove(self, number: int, name: str) -> None:
        store = self.stores[number]
        rows = [entry.row for entry in store.entries() if entry.row.name == name]
        gone = store.remove(rows)
        assert bool(gone) == bool(rows and key_of(name) not in self.held)

    @rule(number=st.integers(0, 1))
    def reopen(self, number: int) -> None:
        self.stores[number].close()

    @rule(damage=st.sampled_from([b"", b"garbage" * 99, None]))
    def damage_index(self, damage: bytes | None) -> None:
        path = self.root / "index.sqlite"
        if damage is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            path.write_bytes(damage)

    @rule(name=NAMES, file=st.sampled_from([CONFIG, WEIGHTS, "origin.json"]))
    def damage_files(self, name: str, file: str) -> None:
        for path in self.root.glob(f"adapters/{name}-*"):
            if key_of(name) not in self.held:
                (path / file).write_bytes(b"{")
                assert self.stores[0].find(key_of(name)) is None
                assert not path.exists()

    @invariant()
    def what_is_held_is_there(self) -> None:
        for path, files, _ in self.held.values():
            assert content_of(path) == files

    @invariant()
    def index_and_files_agree(self) -> None:
        if not self.root.joinpath("adapters").exists():
            return
        there = {
            path.name: sum(f.stat().st_size for f in path.iterdir() if f.name != "origin.json")
            for path in (*self.root.glob("adapters/*"), *self.root.glob("partial/*"))
        }
        assert not list(self.root.glob("trash/*"))
        assert sum(there.values()) <= BUDGET
        for store in self.stores:
            rows = {entry.row.folder: entry.row for entry in store.entries()}
            assert set(rows) == set(there)
            assert sum(row.nbytes for row in rows.values()) <= BUDGET
            assert all(row.partial or row.nbytes == there[name] for name, row in rows.items())
            assert {row.folder for row in store._index.rows()} == set(there)


StoreMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.reuse, Phase.generate, Phase.shrink),  # "explain" traces every line: minutes
)
test_any_order_of_events = StoreMachine.TestCase
