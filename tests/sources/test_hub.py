"""Hub refs, out of a Hugging Face cache on disk; offline, as CI is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real.parts import write_adapter

COMMIT = "1a2b3c4d" * 5

SCRIPT = """
import sys
from lora_cache import AdapterRef
from lora_cache.errors import LoraCacheError
from lora_cache.sources import HubSource
try:
    adapter = HubSource().resolve(AdapterRef.parse(sys.argv[1]))
    print(adapter.key.digest, adapter.key.name, adapter.path.name, adapter.manifest.rank)
except LoraCacheError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """What huggingface_hub leaves behind after a download."""
    repository = tmp_path / "hub" / "models--acme--sql-lora"
    write_adapter(repository / "snapshots" / COMMIT, rank=8)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path


def resolve(home: Path, ref: str) -> str:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ref],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("ref", ["acme/sql-lora", f"acme/sql-lora@{COMMIT}", "acme/sql-lora@main"])
def test_a_ref_resolves_to_its_commit(hub_cache: Path, ref: str) -> None:
    assert resolve(hub_cache, ref) == f"hub:acme/sql-lora@{COMMIT} sql-lora {COMMIT} 8"


def test_what_is_not_there_is_one_clear_error(hub_cache: Path) -> None:
    answer = resolve(hub_cache, "acme/other")
    assert answer.startswith("SourceError acme/other cannot be looked up: HF_HUB_OFFLINE")
    assert resolve(hub_cache, "acme/sql-lora@v2").startswith("SourceError")


def test_a_broken_snapshot_is_named(hub_cache: Path) -> None:
    snapshot = hub_cache / "hub" / "models--acme--sql-lora" / "snapshots" / COMMIT
    (snapshot / "adapter_config.json").write_text("{")
    assert resolve(hub_cache, "acme/sql-lora").startswith("InvalidAdapterError")
    shutil.rmtree(snapshot)
