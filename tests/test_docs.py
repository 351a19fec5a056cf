"""The documentation is true: its code runs, its links lead somewhere, nothing in it is stale."""

from __future__ import annotations

import importlib
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lora_cache.state import TRANSITIONS, CopyState, Tier

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

NEEDS_VLLM = re.compile(r"^(from vllm|llm = LLM| *await|async (with|for))", re.MULTILINE)

PACKAGES = [
    "lora_cache",
    "lora_cache.engines",
    "lora_cache.memory",
    "lora_cache.plan",
    "lora_cache.policies",
    "lora_cache.sources",
    "lora_cache.store",
    "lora_cache.testing",
]
LAZY = {"lora_cache": ["LLM"]}  # see test_import.py
ELSEWHERE = {"__version__", "LoraCacheError"}  # the latter with all other errors


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks() -> list[object]:
    return [
        pytest.param(block, id=f"{name_of(path)}-{number}")
        for path in DOCS
        if path.name != "writing-a-policy.md"  # one package: tests/test_writing_a_policy.py
        for number, block in enumerate(BLOCK.findall(path.read_text()))
    ]


@pytest.mark.parametrize("block", blocks())
def test_code_compiles_and_runs(block: str) -> None:
    """Blocks that need a running vLLM use ``await`` at top level: those are only compiled."""
    import ast

    code = compile(block, "doc", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if not NEEDS_VLLM.search(block):
        exec(code, {"__name__": "doc"})


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


class TestThePictureOfTiersAndStates:
    PICTURE = ET.parse(ROOT / "docs" / "tiers.svg").getroot()

    def with_attribute(self, name: str) -> dict[str, str]:
        """The words beside or inside what carries the attribute, by its value."""
        return {
            element.attrib[name]: " ".join("".join(element.itertext()).split())
            for element in self.PICTURE.iter()
            if name in element.attrib
        }

    def test_has_every_tier(self) -> None:
        assert self.with_attribute("data-tier").keys() == set(Tier)

    def test_has_every_state_by_its_name(self) -> None:
        states = self.with_attribute("data-state")
        assert states.keys() == set(CopyState)
        assert all(state.upper() in words for state, words in states.items())

    def test_has_every_transition_and_no_other(self) -> None:
        arrows = [
            (element.attrib["data-from"], element.attrib["data-to"])
            for element in self.PICTURE.iter()
            if "data-from" in element.attrib
        ]
        table = [(start, end) for start, ends in TRANSITIONS.items() for end in ends]
        assert sorted(arrows) == sorted(table)


class TestTheReference:
    PAGES = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    ENTRIES = frozenset(re.findall(r"^::: (\S+)$", PAGES, re.MULTILINE))

    @pytest.mark.parametrize("module", PACKAGES)
    def test_has_everything_public(self, module: str) -> None:
        names = {*importlib.import_module(module).__all__, *LAZY.get(module, ())} - ELSEWHERE
        assert names <= {entry.rpartition(".")[2] for entry in self.ENTRIES}

    def test_has_the_errors(self) -> None:
        """As the module that they are in, so none can be missing."""
        assert "lora_cache.errors" in self.ENTRIES
