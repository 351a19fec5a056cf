"""What is known of adapters: ranks, bytes, targets; and of traffic."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.errors import AdapterNotFoundError, ConfigError
from lora_cache.plan import Ranks, Traffic, in_directory, of_ranks, read_model
from lora_cache.sim import open_trace, parse_hold
from tests.plan.configs import tiny
from tests.real.parts import LAYERS, SHAPES, write_adapter

HEADER = "time_s,adapter,input_tokens,output_tokens,rank"


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("16", {16: 1.0}),
        ("8,64", {8: 0.5, 64: 0.5}),
        ("64:30,8:70", {8: 0.7, 64: 0.3}),
        ("8:0.5,16:1.5", {8: 0.25, 16: 0.75}),
    ],
)
def test_ranks_are_parsed(text: str, shares: dict[int, float]) -> None:
    ranks = Ranks.parse(text)
    assert dict(ranks.shares) == pytest.approx(shares)
    assert ranks.largest == max(shares)


@pytest.mark.parametrize("text", ["", "x", "0", "-8", "8,8", "8:0", "8:-1", "8:inf", "8:", "8;16"])
def test_malformed_ranks(text: str) -> None:
    with pytest.raises(ConfigError, match="write 16, or 8,16,64"):
        Ranks.parse(text)


def test_padding() -> None:
    assert Ranks.parse("8").wasted(64) == 0.875
    mixed = Ranks.parse("8:98,64:2")
    assert mixed.mean == pytest.approx(9.12)
    assert mixed.without_largest() == Ranks.parse("8")
    assert Ranks.parse("8").without_largest() is None


@given(st.lists(st.integers(1, 64), min_size=1))
def test_shares_add_up(ranks: list[int]) -> None:
    made = Ranks.of(ranks)
    assert sum(share for _, share in made.shares) == pytest.approx(1)
    assert made.mean == pytest.approx(sum(ranks) / len(ranks))
    assert 0 <= made.wasted(64) < 1


def test_a_directory_of_adapters(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", rank=4, targets=("q_proj", "v_proj"))
    write_adapter(tmp_path / "b", rank=16, targets=("down_proj",))
    (tmp_path / "not an adapter").mkdir()
    broken = write_adapter(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"")
    found = in_directory(tmp_path, 2)
    assert (found.count, found.ranks.shares) == (2, ((4, 0.5), (16, 0.5)))
    assert found.targets == ("down_proj", "q_proj", "v_proj")
    assert [name for name, _ in found.refused] == ["broken"]

    def numbers(rank: int, *targets: str) -> int:
        return LAYERS * rank * sum(sum(SHAPES[target]) for target in targets)

    total = numbers(4, "q_proj", "v_proj") + numbers(16, "down_proj")
    assert found.disk_bytes == 4 * total / 2, "saved in float32"
    assert found.host_bytes == 2 * total / 2
    assert in_directory(tmp_path / "a", 2).count == 1


def test_directories_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no adapter that can be served"):
        in_directory(tmp_path, 2)
    with pytest.raises(AdapterNotFoundError):
        in_directory(tmp_path / "nowhere", 2)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"can be served: .*adapter_config"):
        in_directory(tmp_path, 2)


def test_adapters_of_some_ranks(tmp_path: Path) -> None:
    model = read_model(tiny(tmp_path, "llama"))
    found = of_ranks(Ranks.parse("8:50,16:50"), model, 2)
    assert found.host_bytes == found.disk_bytes == 12 * model.adapter_numbers(1) * 2
    assert (found.count, found.targets) == (None, None)


# ---------------------------------------------------------------------- traffic


def traffic(tmp_path: Path, rows: list[str], hold: str = "0.5/token") -> Traffic:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([HEADER, *rows]))
    return Traffic.of(open_trace(str(path)), parse_hold(hold))


def test_a_trace_in_numbers(tmp_path: Path) -> None:
    found = traffic(tmp_path, ["10,a,90,10,8", "12,b,50,50,", "20,a,200,20,16"])
    assert (found.requests, found.adapters, found.longest) == (3, 2, 220)
    assert found.rate == 0.3
    assert found.tokens_in_flight == (100 * 5 + 100 * 25 + 220 * 10) / 10
    assert found.ranks == Ranks.parse("16"), "the last word on a"
    assert traffic(tmp_path, ["1,a,1,1,", "2,a,1,1,"], "none").tokens_in_flight == 0


def test_a_trace_of_one_moment(tmp_path: Path) -> None:
    found = traffic(tmp_path, ["3,a,1,1,"])
    assert (found.rate, found.tokens_in_flight, found.ranks) == (0, 0, None)
    with pytest.raises(ConfigError, match="holds no requests"):
        traffic(tmp_path, [])
