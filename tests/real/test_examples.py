"""The examples of the documentation, run as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cache.demo.catalogue import adapter_dir

pytestmark = pytest.mark.vllm

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_the_usual_script_with_only_the_import_changed() -> None:
    pytest.importorskip("vllm")
    from lora_cache.demo.model import prepare_model

    arguments = [str(prepare_model()), str(adapter_dir("pirate")), str(adapter_dir("cowboy"))]
    # What a GPU machine would not need: a small cache, and float32 where bfloat16 is slow.
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "many_adapters.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pirate, cowboy, *again = done.stdout.splitlines()[-5:-1]
    assert again == [pirate, cowboy]
    assert "matey" in pirate
    assert "Howdy" in cowboy
    stats = done.stdout.splitlines()[-1]
    assert "disk_hits=2" in stats
    assert "host_hits=2" in stats
