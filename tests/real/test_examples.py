"""The examples of the documentation, run as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cache.demo.catalogue import adapter_dir
from tests.real.engines import DEMO_MODEL

pytestmark = [pytest.mark.vllm, DEMO_MODEL]

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(example: str, *arguments: str) -> list[str]:
    """Run an example, and return the lines that it printed."""
    # What a GPU machine would not need: a small cache, and one thread where others compute.
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # set by other tests, not by readers
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_usual_script_with_only_the_import_changed() -> None:
    pytest.importorskip("vllm")
    from lora_cache.demo.model import prepare_model

    arguments = [str(prepare_model()), str(adapter_dir("pirate")), str(adapter_dir("cowboy"))]
    pirate, cowboy, *again, stats = run("many_adapters.py", *arguments)[-5:]
    assert again == [pirate, cowboy]
    assert "matey" in pirate
    assert "Howdy" in cowboy
    assert "disk_hits=2" in stats
    assert "host_hits=2" in stats


def test_the_tour_prints_what_it_says_it_prints() -> None:
    """Lines ``# > …`` of the script are its output; an ellipsis stands for anything."""
    pytest.importorskip("vllm")
    shown = re.findall(r"^# > (.*)$", (EXAMPLES / "tour.py").read_text(), re.MULTILINE)
    assert shown
    printed = run("tour.py")[-len(shown) :]
    for pattern, line in zip(shown, printed, strict=True):
        assert re.fullmatch(re.escape(pattern).replace("…", ".*"), line), (pattern, line)
