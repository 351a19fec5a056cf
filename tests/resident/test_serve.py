"""The resident engine in `vllm serve`: vLLM's own until a cache attaches, and again afterwards.

The cache sits in the server's process, around the client that the server itself uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.real.engines import MAX_LORAS, engine_arguments
from tests.real.test_stock_engine import prompt
from tests.resident.serving import Server
from tests.resident.test_engine import stock_answer

# One server is enough: in several processes of pytest each would start its own.
pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("serve"), pytest.mark.timeout(600)]

STATIC = 8  # the adapter that the server is started with
PROMPT, TOKENS = prompt(4)["prompt_token_ids"], 12


def options(model: Path, adapters: list[Path]) -> list[str]:
    """The arguments of the tests' engines, as the command takes them."""
    found = ["--served-model-name", "base", "--lora-modules", f"static={adapters[STATIC]}"]
    arguments = engine_arguments(model)
    del arguments["model"]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", str(value)]
    return found


@pytest.fixture(scope="module")
def starting(
    tiny_model: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    plugins = {"manager": "tests.resident.manager_plugin:ManagerPlugin"}
    directory = tmp_path_factory.mktemp("server")
    server = Server(tiny_model, directory, plugins, options(tiny_model, adapters))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def expected(starting: Server, llm: Any, adapters: list[Path]) -> list[list[int]]:
    """What an in-process stock vLLM answers, by adapter; computed while the server starts."""
    return [stock_answer(llm, path, 70 + number) for number, path in enumerate(adapters)]


@pytest.fixture
def server(starting: Server, expected: list[list[int]]) -> Server:
    starting.wait()
    return starting


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def test_without_a_cache_it_is_vllm_s_own(
    server: Server, llm: Any, expected: list[list[int]], adapters: list[Path]
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    (base,) = llm.generate([prompt(4)], params, use_tqdm=False)
    assert server.complete("base", PROMPT, TOKENS) == list(base.outputs[0].token_ids)
    assert server.complete("static", PROMPT, TOKENS) == expected[STATIC]
    for number in (0, 1):
        name = f"loaded{number}"
        assert server.post(
            "/v1/load_lora_adapter", lora_name=name, lora_path=str(adapters[number])
        ).ok
        assert server.complete(name, PROMPT, TOKENS) == expected[number]
    held = server.loras()
    assert len(held) == 3

    # The hazard: the name is gone, and the engine was told nothing.
    for number in (0, 1):
        assert server.post("/v1/unload_lora_adapter", lora_name=f"loaded{number}").ok
    assert server.post("/v1/completions", model="loaded0", prompt=PROMPT).status_code == 404
    assert server.loras() == held


def test_a_cache_in_the_server_s_process_decides_who_is_in_the_slots(
    server: Server, expected: list[list[int]], adapters: list[Path]
) -> None:
    assert server.get("/manager/attach") == "resident"
    assert server.loras() == set(), "the slots of those that nobody has leased are its own now"
    assert server.post("/manager/attach").status_code == 500, "one manager an engine"

    def ask(number: int) -> list[int]:
        path = str(adapters[number])
        found: list[int] = server.get(
            "/manager/ask", prompt=PROMPT, max_tokens=TOKENS, adapter=path
        )
        return found

    with ThreadPoolExecutor(8) as pool:
        order = [*range(len(adapters)), *range(len(adapters))]
        assert list(pool.map(ask, order)) == expected * 2
    managed = server.loras()
    assert len(managed) == MAX_LORAS

    refused = server.post("/v1/load_lora_adapter", lora_name="more", lora_path=str(adapters[0]))
    assert not refused.ok
    assert "lora_cache manages the slots, and none is free" in refused.text
    assert server.loras() == managed

    # A request that no lease has announced is answered; its adapter does not stay.
    assert server.complete("static", PROMPT, TOKENS) == expected[STATIC]
    wait_until(lambda: all(number >= 1 << 30 for number in server.loras()))
    assert server.get("/manager/reconcile") == 0
    assert [ask(number) for number in range(4)] == expected[:4]

    seen = server.get("/manager/detach")
    assert seen["gpu_evictions"] >= len(adapters)
    assert seen["load_failures"] == 0
    assert seen["displaced"] == 1, "of all these requests one was not leased"
    assert server.loras() == set()
    assert server.complete("static", PROMPT, TOKENS) == expected[STATIC]
    assert len(server.loras()) == 1
