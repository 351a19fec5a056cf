"""Where pieces lie in an image, and when one worker's image is right for another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cache.engines.resident.layout import ALIGNMENT, ITEM_BYTES, Contents, Layout, Piece
from tests.resident.layouts import plain_layout
from tests.resident.parts import HIDDEN, LAYERS, LINEAR, MAX_RANK


def pieces(source_count: int) -> st.SearchStrategy[Piece]:
    spans = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 50)), min_size=1, max_size=3)
    window = st.tuples(st.integers(0, 20), st.integers(1, 20))
    return st.builds(
        lambda spans, window, **rest: Piece(
            spans=tuple((start, start + length) for start, length in spans),
            rank_start=window[0],
            rank_stop=sum(window),
            **rest,
        ),
        spans=spans,
        window=window,
        module=st.just("m"),
        index=st.none(),
        matrix=st.sampled_from(("A", "B")),
        source=st.integers(0, source_count - 1),
        rank_first=st.booleans(),
        width=st.just(200),
        width_is_exact=st.booleans(),
    )


@st.composite
def layouts(draw: Any) -> tuple[Layout, Contents]:
    count = draw(st.integers(1, 20))
    layout = plain_layout(
        draw(st.sampled_from(sorted(ITEM_BYTES))),
        sources=tuple(f"s{number}" for number in range(count)),
        pieces=tuple(draw(st.lists(pieces(count), max_size=20))),
        max_rank=40,
    )
    present = draw(st.sets(st.integers(0, count - 1)))
    return layout, Contents.of(draw(st.integers(1, 40)), present, count)


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_pieces_never_overlap_and_nbytes_is_exact(drawn: tuple[Layout, Contents]) -> None:
    layout, contents = drawn
    end, numbers = 0, []
    for placed in layout.place(contents):
        assert placed.offset % ALIGNMENT == 0
        assert end <= placed.offset < end + ALIGNMENT, "no overlap, no gap but the alignment's"
        end = placed.offset + placed.shape[0] * placed.shape[1] * layout.item_bytes
        assert end > placed.offset
        numbers.append(placed.number)
    assert end <= layout.nbytes(contents) < end + ALIGNMENT
    assert layout.nbytes(contents) <= layout.max_nbytes(contents.rank)
    expected = [
        number
        for number, piece in enumerate(layout.pieces)
        if contents.has(piece.source) and piece.ranks(contents.rank)
    ]
    assert numbers == expected


@given(st.integers(1, 99), st.sets(st.integers(0, 70)))
def test_contents_remember_what_is_present(rank: int, present: set[int]) -> None:
    contents = Contents.of(rank, present, 71)
    assert {source for source in range(71) if contents.has(source)} == present
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(contents), type=Contents) == contents
    assert len({contents, Contents.of(rank, set(present), 71)}) == 1


@given(layouts())
@settings(max_examples=30, deadline=None)
def test_layouts_survive_the_wire(drawn: tuple[Layout, Contents]) -> None:
    layout, _ = drawn
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=Layout)
    assert back == layout
    assert back.digest == layout.digest


def test_a_known_size() -> None:
    layout = plain_layout()
    per_rank = 2 * LAYERS * sum(sum(piece.spans[0]) for piece in layout.pieces[: 2 * len(LINEAR)])
    assert layout.max_nbytes(8) == 8 * per_rank
    one = Contents.of(1, {0}, len(layout.sources))
    assert layout.nbytes(one) == 2 * (HIDDEN + HIDDEN)
    assert layout.nbytes(Contents.of(1, set(), len(layout.sources))) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"vllm_version": "1"},
        {"dtype": "float32"},
        {"tp_rank": 1},
        {"tp_size": 2},
        {"fully_sharded": True},
        {"honours_patterns": False},
        {"pieces": plain_layout().pieces[:-1]},
        {"sources": plain_layout().sources[::-1]},
    ],
    ids=str,
)
def test_whatever_changes_bytes_changes_the_digest(changes: dict[str, Any]) -> None:
    assert msgspec.structs.replace(plain_layout(), **changes).digest != plain_layout().digest


def test_below_a_slow_module_everything_is_slow() -> None:
    layout = plain_layout(slow=("model.layers.0.mlp.experts", "score"))
    slow = ("score", "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.3.w1")
    fast = ("scores", "model.layers.0.mlp", "model.layers.1.mlp.experts", "model.score")
    assert all(map(layout.needs_slow_path, slow))
    assert not any(map(layout.needs_slow_path, fast))


def test_layouts_need_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['vllm'] = None\n"
        "import lora_cache.engines.resident.layout, lora_cache.engines.resident.names\n"
        "import lora_cache.engines.resident.peft_config"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


@pytest.mark.long
def test_packing_imports_no_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import lora_cache.engines.resident.packing, lora_cache.engines.resident.slots"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


@pytest.mark.vllm
def test_a_worker_s_layout(rig: Callable[..., Any]) -> None:
    engine = rig("llama")
    layout = engine.layout
    assert (layout.slow, layout.resets, layout.refusal) == ((), (), None)
    assert set(plain_layout().sources) <= set(layout.sources)
    assert {"model.embed_tokens", "lm_head"} < set(layout.sources)
    table = next(p for p in layout.pieces if p.module == "model.embed_tokens" and p.matrix == "A")
    assert not table.rank_first
    assert layout.max_rank == MAX_RANK
    assert layout.honours_patterns
    stacked = {t.untyped_storage().data_ptr() for t in engine.writer._tensors}
    assert len(stacked) == len(layout.pieces), "every piece has a tensor of its own"


@pytest.mark.vllm
def test_a_mixture_s_experts_are_marked_slow(rig: Callable[..., Any]) -> None:
    layout = rig("mixtral").layout
    experts = tuple(f"model.layers.{n}.block_sparse_moe.experts" for n in range(LAYERS))
    assert layout.resets == experts
    assert layout.slow == experts
    assert layout.needs_slow_path(f"{experts[0]}.3.w1")
    assert not any(".experts" in source for source in layout.sources)


@pytest.mark.vllm
def test_where_a_module_has_two_names_nothing_is_packed(
    rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From vLLM 0.33 on, adapters of the bare language model fit multimodal models, too."""
    from lora_cache.engines.resident.describe import describe

    manager = rig("llama").manager
    monkeypatch.setattr(manager, "supports_mm", True)
    assert describe(manager).refusal is None, "0.32 knows but one"
    monkeypatch.setattr(type(manager), "_get_text_lora_names", lambda *_: [], raising=False)
    assert "in another way" in str(describe(manager).refusal)


@pytest.mark.vllm
def test_describing_leaves_the_slots_alone(rig: Callable[..., Any]) -> None:
    from lora_cache.engines.resident.describe import describe
    from tests.resident.parts import differing, slot_of, soil

    engine = rig("llama")
    soil(engine.manager, 0)
    before = slot_of(engine.manager, 0)
    assert describe(engine.manager).digest == engine.layout.digest
    assert differing(slot_of(engine.manager, 0), before) == []


@pytest.mark.vllm
@pytest.mark.parametrize("called", ["get_rename_mapper", "get_unstacked_mapper"])
def test_renames_for_stacked_weights_are_not_an_adapter_s(called: str) -> None:
    """VLLM 0.26 and 0.32 leave them out by methods of different names; Llama has them in 0.26."""
    from types import SimpleNamespace

    from lora_cache.engines.resident.describe import _renames

    renaming = SimpleNamespace(orig_to_new_prefix={"old.": "new."})
    mapper = SimpleNamespace(
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")}, **{called: lambda: renaming}
    )
    renames, refusal = _renames(SimpleNamespace(hf_to_vllm_mapper=mapper))
    assert refusal is None
    assert renames.prefix == (("old.", "new."),)
    del mapper.__dict__[called]
    assert _renames(SimpleNamespace(hf_to_vllm_mapper=mapper))[1], "not known how to leave out"
