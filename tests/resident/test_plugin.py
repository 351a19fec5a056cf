"""The switch: inert unless set, lazy, idempotent, and careful with a vLLM that it does not know."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lora_cache.engines import FORCE, SWITCH, is_switched_on
from lora_cache.engines.resident import compat, plugin

pytestmark = pytest.mark.vllm

ASK = """
import sys
from lora_cache.engines.resident import plugin
for _ in range(3):
    plugin.register()
for heavy in ("lora_cache.engines.resident.worker", "vllm.lora.worker_manager"):
    assert {vllm_first} or heavy not in sys.modules, "registering must be cheap"
import vllm.v1.worker.lora_model_runner_mixin as mixin
for _ in range(3):
    plugin.register()
load = mixin.LoRAModelRunnerMixin.load_lora_model
print("FOUND", mixin.LRUCacheWorkerLoRAManager.__name__, hasattr(load, "__wrapped__"),
      hasattr(getattr(load, "__wrapped__", None), "__wrapped__"),
      sum(type(finder).__module__.startswith("lora_cache") for finder in sys.meta_path))
"""


def in_a_process(switch: str | None, first: str = "") -> list[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if switch is not None:
        environment[SWITCH] = switch
    done = subprocess.run(
        [sys.executable, "-c", first + ASK.format(vllm_first=bool(first))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    return line.split()[1:]


def test_inert_without_the_switch() -> None:
    assert in_a_process(None) == ["LRUCacheWorkerLoRAManager", "False", "False", "0"]


@pytest.mark.parametrize("switch", ["", "0", "no"])
def test_another_value_is_no_switch(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, switch)
    before = list(sys.meta_path)
    plugin.register()
    assert sys.meta_path == before


@pytest.mark.parametrize("first", ["", "import vllm.v1.worker.lora_model_runner_mixin\n"])
def test_takes_over_once_before_or_after_the_import(first: str) -> None:
    assert in_a_process("1", first) == ["ResidentLoRAManager", "True", "False", "0"]


@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: the module that is taken over was not imported yet."""
    monkeypatch.delitem(sys.modules, compat.MIXIN_MODULE, raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


NEVER_RUN = ["0.25.2", "0.27.0", "0.31.1", "0.33.0", "0.34.0", "1.0.0", "0.3.1.dev0"]


@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize("version", NEVER_RUN)
def test_a_version_that_was_never_run_stays_stock_unless_forced(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    before = list(sys.meta_path)
    monkeypatch.setenv(SWITCH, "1")
    plugin.register()
    assert sys.meta_path == before
    (record,) = caplog.records
    assert (
        f"stays off: vLLM {version} is installed, and the resident engine was run with 0.26 "
        in (message := record.getMessage())
    )
    assert f"{SWITCH}={FORCE}" in message

    caplog.clear()
    monkeypatch.setenv(SWITCH, FORCE)
    plugin.register()
    plugin.register()
    assert len(sys.meta_path) == len(before) + 1
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert "on by force" in caplog.text


@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize("version", ["0.26.0", "0.26.1.dev3", "0.32.0", "0.32.1+cpu"])
@pytest.mark.parametrize("switch", ["1", FORCE])
def test_a_version_that_was_run_is_switched_on(
    version: str, switch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    monkeypatch.setenv(SWITCH, switch)
    before = len(sys.meta_path)
    plugin.register()
    assert len(sys.meta_path) == before + 1
    assert caplog.records == []
    assert is_switched_on()


def test_a_vllm_that_lacks_what_we_need_stays_stock(caplog: pytest.LogCaptureFixture) -> None:
    stock = type("Stock", (), {"_manager_cls": type("Manager", (), {})})
    mixin = ModuleType("mixin")
    mixin.__dict__.update(
        LRUCacheWorkerLoRAManager=stock,
        LoRAModelRunnerMixin=SimpleNamespace(load_lora_model=None),
    )
    caplog.set_level(logging.ERROR)
    compat.take_over(mixin)
    assert mixin.LRUCacheWorkerLoRAManager is stock
    assert "lacks Stock._apply_adapters" in caplog.text
    assert "Manager.activate_adapter" in caplog.text


def test_the_installed_vllm_has_what_we_need() -> None:
    assert compat.never_run() is None
    assert compat.missing_names(import_module(compat.MIXIN_MODULE)) == []


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (target,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, name = target.partition(":")
    assert getattr(import_module(module), name) is plugin.register
