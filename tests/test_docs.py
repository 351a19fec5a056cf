"""Code in the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

NEEDS_VLLM = re.compile(r"^(from vllm|llm = LLM| *await|async (with|for))", re.MULTILINE)


def blocks() -> list[object]:
    return [
        pytest.param(block, id=f"{path.name}-{number}")
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


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
