"""The tree of errors is the one that is drawn, and copies of errors lose nothing."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

import lora_cache.testing
from lora_cache import errors
from lora_cache.adapter import AdapterKey
from lora_cache.errors import LeaseTimeoutError, LoadFailedError, LoraCacheError
from lora_cache.state import Tier

KEY = AdapterKey("test:1", "sql")
LAZY = {"LLM"}  # imported with vLLM, by those who ask for it: see test_import.py


def drawn_tree() -> set[tuple[str, str]]:
    """(parent, child) of every branch in the module's docstring."""
    path, pairs = ["LoraCacheError"], set()
    for line in (errors.__doc__ or "").splitlines():
        if branch := re.match(r"^([│ ]*)[├└]── (\w+)", line):
            depth = 1 + len(branch[1]) // 4
            path[depth:] = [branch[2]]
            pairs.add((path[depth - 1], path[depth]))
    return pairs


def real_tree(base: type[LoraCacheError] = LoraCacheError) -> set[tuple[str, str]]:
    pairs = set()
    for child in base.__subclasses__():
        if child.__module__.startswith("lora_cache"):
            pairs |= {(base.__name__, child.__name__)} | real_tree(child)
    return pairs


def all_errors() -> list[type[LoraCacheError]]:
    names = {name for pair in real_tree() for name in pair}
    return [getattr(errors, name) for name in sorted(names)]


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    drawn = drawn_tree()
    assert ("LoraCacheError", "AdapterError") in drawn, "the drawing was read"
    assert drawn == real_tree()


def test_every_error_explains_itself() -> None:
    assert len(all_errors()) > 10
    for error in all_errors():
        assert error.__doc__, error


def test_a_lease_timeout_is_a_timeout() -> None:
    with pytest.raises(TimeoutError, match="no slot came free"):
        raise LeaseTimeoutError("no slot came free", key=KEY)


@pytest.mark.parametrize("error", all_errors())
def test_the_message_is_the_text_of_the_error(error: type[LoraCacheError]) -> None:
    made = error("what to do", key=KEY, tier=Tier.GPU)
    assert str(made) == "what to do"
    assert (made.key, made.tier) == (KEY, Tier.GPU)
    assert (error("x").key, error("x").tier) == (None, None)


@pytest.mark.parametrize("error", all_errors())
def test_copies_keep_what_the_error_is_about(error: type[LoraCacheError]) -> None:
    made = error("what to do", key=KEY, tier=Tier.HOST)
    for again in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again is not made
        assert type(again) is error
        assert (str(again), again.key, again.tier) == ("what to do", KEY, Tier.HOST)


def test_copies_of_a_failed_load_keep_when_to_try_again() -> None:
    made = LoadFailedError("no", key=KEY, tier=Tier.GPU, retry_after_s=2.5)
    again = copy.copy(made)
    assert (again.retry_after_s, again.key, again.tier) == (2.5, KEY, Tier.GPU)
    assert LoadFailedError("no").retry_after_s == 0.0


def test_every_exported_name_exists() -> None:
    assert len(set(lora_cache.__all__)) == len(lora_cache.__all__) > 0
    missing = set(lora_cache.__all__) - set(vars(lora_cache))
    assert missing <= LAZY


def test_what_was_never_exported_is_an_attribute_error() -> None:
    assert not hasattr(lora_cache, "nothing_of_this_name")
