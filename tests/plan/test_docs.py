"""The example in docs/plan.md is what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_cache.cli import app
from tests.plan.configs import PUBLISHED, write_config

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
FENCED = re.MULTILINE | re.DOTALL
NAME = "meta-llama/Llama-3.1-8B"
EXAMPLE = re.search(r"^```\n\$ lora-cache (plan .*?[^\\])\n(.*?)^```$", PAGE, FENCED)

pytestmark = pytest.mark.xdist_group("plan-docs")  # what it prints is made once


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the example prints, with --explain."""
    assert EXAMPLE is not None
    root = tmp_path_factory.mktemp("docs")
    write_config(root / NAME, PUBLISHED["Llama-3.1-8B"][1] | {"max_position_embeddings": 131072})
    arguments = EXAMPLE[1].replace("\\\n", " ").split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        result = CliRunner().invoke(app, [*arguments, "--explain"])
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


def test_the_example(printed: list[str]) -> None:
    assert EXAMPLE is not None
    shown = EXAMPLE[2].splitlines()
    start = printed.index("")  # what --explain adds is between the heading and the table
    assert shown[: start + 1] == printed[: start + 1]
    assert printed[-len(shown[start:]) :] == shown[start:]


def test_the_arithmetic(printed: list[str]) -> None:
    blocks = re.findall(r"^```\n(a slot: rank.*?)^```$", PAGE, FENCED)
    (shown,) = (block.splitlines() for block in blocks)
    start = printed.index(shown[0])
    assert printed[start : start + len(shown)] == shown
