"""Importing the package is cheap: what serves models stays out until an engine is built."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "transformers", "pynvml", "huggingface_hub", "ray")


@pytest.mark.parametrize("modules", ["lora_cache", "lora_cache, lora_cache.testing"])
def test_importing_the_package_imports_nothing_heavy(modules: str) -> None:
    code = f"import json, sys, {modules}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "lora_cache" in loaded
    assert not loaded & set(HEAVY)


def test_the_policy_contract_needs_pytest_and_hypothesis_only_to_run() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = sys.modules['pytest'] = None\n"
        "import lora_cache.testing\n"
        "from lora_cache.testing.policy_contract import PolicyContract\n"
        "print(PolicyContract.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["PolicyContract"]


def test_asking_for_what_needs_vllm_without_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None; import lora_cache\n"
        "try: lora_cache.LLM\n"
        "except lora_cache.LoraCacheError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("MissingExtraError ")
    assert "pip install 'lora-cache[vllm]'" in done.stdout
