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

SWITCHED = pytest.mark.xdist_group("switched")

#: What a process finds, by what its environment says and what it imports first.
CASES = {
    "off": (None, ""),
    "on": ("1", ""),
    "on, late": ("1", "import vllm.v1.worker.lora_model_runner_mixin\n"),
}

# One process imports what most of the time goes into, and nothing that the switch is about; each
# case is a fork of it.
ASK = """
import os, sys, traceback
import vllm.config

def find(name, switch, first):
    os.environ.pop({switch_name!r}, None)
    if switch is not None:
        os.environ[{switch_name!r}] = switch
    heavy = ("lora_cache.engines.resident.worker", "vllm.lora.worker_manager")
    assert not {{*heavy, "vllm.v1.worker.lora_model_runner_mixin"}} & {{*sys.modules}}
    exec(first)
    from lora_cache.engines.resident import plugin
    for _ in range(3):
        plugin.register()
    assert first or not {{*heavy}} & {{*sys.modules}}, "registering must be cheap"
    import vllm.v1.worker.lora_model_runner_mixin as mixin
    for _ in range(3):
        plugin.register()
    load = mixin.LoRAModelRunnerMixin.load_lora_model
    print("FOUND", name, mixin.LRUCacheWorkerLoRAManager.__name__, hasattr(load, "__wrapped__"),
          hasattr(getattr(load, "__wrapped__", None), "__wrapped__"),
          sum(type(finder).__module__.startswith("lora_cache") for finder in sys.meta_path),
          sep="|", flush=True)

for name, (switch, first) in {cases!r}.items():
    child = os.fork()
    if child == 0:
        try:
            find(name, switch, first)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """By case: the manager, whether loading is wrapped, whether twice, and finders left over."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(switch_name=SWITCH, cases=CASES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("|") for line in done.stdout.splitlines() if line.startswith("FOUND")]
    return {name: said for _, name, *said in lines}


@SWITCHED
def test_inert_without_the_switch(found: dict[str, list[str]]) -> None:
    assert found["off"] == ["LRUCacheWorkerLoRAManager", "False", "False", "0"]


@pytest.mark.parametrize("switch", ["", "0", "no"])
def test_another_value_is_no_switch(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, switch)
    before = list(sys.meta_path)
    plugin.register()
    assert sys.meta_path == before


@SWITCHED
@pytest.mark.parametrize("case", ["on", "on, late"])
def test_takes_over_once_before_or_after_the_import(case: str, found: dict[str, list[str]]) -> None:
    assert found[case] == ["ResidentLoRAManager", "True", "False", "0"]


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
