"""Names with settings: of policies and of synthetic traffic."""

from __future__ import annotations

import math

import pytest

from lora_cache.errors import ConfigError
from lora_cache.policies import LFU, make_policy
from lora_cache.policies.base import Policy
from lora_cache.spec import call_with, parse_spec, split_specs


def test_parse() -> None:
    assert parse_spec("lru") == ("lru", {})
    assert parse_spec("lfu:half_life_s=inf") == ("lfu", {"half_life_s": "inf"})
    assert parse_spec("x: a = 1 , b=c:d") == ("x", {"a": "1", "b": "c:d"})


@pytest.mark.parametrize("text", ["x:", "x:a", "x:=1", "x:a=", "x:a=1,", "x:a=1,a=2"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_spec(text)


def test_split() -> None:
    assert split_specs("lru") == ["lru"]
    assert split_specs("lru,slru:a=1,b=2,fifo") == ["lru", "slru:a=1,b=2", "fifo"]
    assert split_specs("a:x=1,b:y=2") == ["a:x=1", "b:y=2"]
    assert split_specs("x=1,lru") == ["x=1", "lru"]


def test_call_with_turns_numbers_into_numbers() -> None:
    def made(a: int, b: float = 0.5, *, c: str = "") -> tuple[int, float, str]:
        return a, b, c

    assert call_with(made, {"a": "3", "b": "inf", "c": "word"}, "made") == (3, math.inf, "word")
    with pytest.raises(ConfigError, match="made has no setting 'd': its settings are a, b, c"):
        call_with(made, {"a": "1", "d": "2"}, "made")
    with pytest.raises(ConfigError, match=r"made: .*missing"):
        call_with(made, {"b": "1"}, "made")


def test_a_policy_with_settings() -> None:
    policy = make_policy("lfu:half_life_s=60")
    assert isinstance(policy, LFU)
    assert policy._half_life_s == 60
    with pytest.raises(ConfigError, match="policy lru has no setting 'size': it has none"):
        make_policy("lru:size=3")
    with pytest.raises(ConfigError, match="policy lfu: "):
        make_policy("lfu:half_life_s=long")
    with pytest.raises(ConfigError, match="half_life_s must be positive"):
        make_policy("lfu:half_life_s=-1")
    with pytest.raises(ConfigError, match="unknown policy 'mru'"):
        make_policy("mru:a=1")


def test_an_error_of_a_policy_without_settings_is_its_own() -> None:
    def broken() -> Policy:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        make_policy(broken)
