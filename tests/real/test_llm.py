"""The drop-in `LLM`: answers of plain vLLM, any number of adapters, whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AdapterRef, CacheConfig
from lora_cache.errors import (
    AdapterNotFoundError,
    ConfigError,
    InvalidAdapterError,
    LoraCacheError,
    RequestRefusedError,
)
from tests.real.engines import ALIVE, engine_arguments
from tests.real.parts import write_adapter

pytestmark = pytest.mark.vllm


def greedy(tokens: int = 8) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def prompts(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [
        {"prompt_token_ids": [rng.randrange(3, 250) for _ in range(rng.randrange(3, 12))]}
        for _ in range(count)
    ]


def texts(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def ours(tiny_model: Path) -> Any:
    from lora_cache import LLM

    arguments = engine_arguments(tiny_model, max_loras=2, max_cpu_loras=14)
    ALIVE.append(LLM(arguments.pop("model"), **arguments))
    return ALIVE[-1]


def test_64_prompts_over_12_adapters_answer_as_plain_runs(
    ours: Any, llm: Any, adapters: list[Path]
) -> None:
    """Also: every adapter is activated once, though there are two slots."""
    from vllm.lora.request import LoRARequest

    asked = prompts(64)
    names = [random.Random(number).randrange(12) for number in range(64)]
    before = ours.stats().activations
    got = texts(
        ours.generate(
            asked,
            greedy(),
            lora_request=[str(adapters[name]) for name in names],
            use_tqdm=False,
        )
    )
    for name, adapter in enumerate(adapters):
        mine = [number for number in range(64) if names[number] == name]
        request = LoRARequest(f"plain-llm-{name}", 5000 + name, str(adapter))
        plain = llm.generate(
            [asked[number] for number in mine], greedy(), lora_request=request, use_tqdm=False
        )
        assert [got[number] for number in mine] == texts(plain)
        llm.llm_engine.remove_lora(5000 + name)
    assert ours.stats().activations - before == len(set(names)) == 12
    assert ours.reconcile() == 0


def test_adapters_are_named_in_every_way(ours: Any, adapters: list[Path]) -> None:
    from vllm.lora.request import LoRARequest

    (asked,) = prompts(1)
    ways = [
        str(adapters[0]),
        adapters[0],
        AdapterRef.local(adapters[0]),
        LoRARequest("mine", 3, str(adapters[0])),
    ]
    answers = [texts(ours.generate(asked, greedy(), lora_request=way)) for way in ways]
    assert all(answer == answers[0] for answer in answers)
    assert texts(ours.generate(asked, greedy())) != answers[0]
    with pytest.raises(ConfigError, match="lora_request is a int"):
        ours.generate(asked, greedy(), lora_request=7)


def test_base_and_adapter_prompts_in_one_call(ours: Any, adapters: list[Path]) -> None:
    asked = prompts(6)
    base = texts(ours.generate(asked, greedy(), use_tqdm=False))
    adapted = texts(ours.generate(asked, greedy(), lora_request=str(adapters[1])))
    which = [None, adapters[1], None, adapters[1], None, adapters[1]]
    mixed = texts(ours.generate(asked, greedy(), lora_request=which))
    assert mixed == [adapted[i] if which[i] else base[i] for i in range(6)]


def test_params_may_be_one_per_prompt(ours: Any, adapters: list[Path]) -> None:
    outputs = ours.generate(
        prompts(3), [greedy(2), greedy(5), greedy(3)], lora_request=str(adapters[0])
    )
    assert [len(tokens) for tokens in texts(outputs)] == [2, 5, 3]


class TestInterrupted:
    def usable(self, ours: Any, adapters: list[Path]) -> None:
        assert not ours.llm_engine.has_unfinished_requests()
        assert all(row.leases == 0 and row.waiting == 0 for row in ours.snapshot().adapters)
        assert ours.reconcile() == 0
        assert ours.generate(prompts(2), greedy(), lora_request=[adapters[4], adapters[5]])

    def test_a_missing_adapter_is_found_before_anything_runs(
        self, ours: Any, adapters: list[Path], tmp_path: Path
    ) -> None:
        before = ours.stats()
        which = [str(adapters[0]), str(tmp_path / "missing")]
        with pytest.raises(AdapterNotFoundError, match="missing"):
            ours.generate(prompts(2), greedy(), lora_request=which)
        assert ours.stats() == before
        self.usable(ours, adapters)

    def test_a_load_that_fails(self, ours: Any, adapters: list[Path], tmp_path: Path) -> None:
        bad = write_adapter(tmp_path / "bad")
        weights = bad / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes().replace(b"attn.q_proj", b"attn.x_proj"))
        with pytest.raises(LoraCacheError, match="could not load bad"):
            ours.generate(prompts(3), greedy(30), lora_request=[adapters[0], bad, adapters[1]])
        self.usable(ours, adapters)

    def test_an_exception_in_a_progress_callback(self, ours: Any, adapters: list[Path]) -> None:
        class Bar:
            def __init__(self, items: Any = (), **_: Any) -> None:
                self.items = items  # vLLM also wraps its rendering in one

            def __iter__(self) -> Any:
                return iter(self.items)

            def update(self, _: int) -> None:
                raise RuntimeError("no terminal")

            def close(self) -> None: ...

        with pytest.raises(RuntimeError, match="no terminal"):
            ours.generate(prompts(8), greedy(20), lora_request=str(adapters[0]), use_tqdm=Bar)
        self.usable(ours, adapters)

    def test_ctrl_c(self, ours: Any, adapters: list[Path]) -> None:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        which = [adapters[number % 6] for number in range(32)]
        with pytest.raises(KeyboardInterrupt):
            ours.generate(prompts(32), greedy(110), lora_request=which, use_tqdm=False)
        timer.join()
        self.usable(ours, adapters)

    def test_a_prompt_that_vllm_refuses(self, ours: Any, adapters: list[Path]) -> None:
        too_long = {"prompt_token_ids": [5] * 500}
        with pytest.raises(RequestRefusedError, match="500"):
            ours.generate([*prompts(2), too_long], greedy(), lora_request=str(adapters[0]))
        self.usable(ours, adapters)

    @pytest.mark.parametrize(
        "call",
        [
            {"prompts": {"prompt_token_ids": []}},
            {"prompts": {"prompt_token_ids": [5] * 128}},
            {"prompts": {"nonsense": 1}},
            {"prompts": 3},
            {"prompts": "text, but there is no tokenizer"},
            {"sampling_params": "hot"},
            {"sampling_params": [None, None, None]},
            {"priority": [1, 2, 3]},
            {"lora_request": 7},
            {"lora_request": ["./a", "./b", "./c"]},
            {"lora_request": "acme/../sql"},
            {"lora_request": "acme/sql\n"},
            {"lora_request": "/dev/null"},
            {"lora_request": "/proc/self/mem"},
            {"lora_request": ""},
            {"lora_request": "nowhere/at-all@main"},
        ],
        ids=str,
    )
    def test_nothing_of_other_packages_leaks(
        self, ours: Any, adapters: list[Path], call: dict[str, Any]
    ) -> None:
        arguments = {"prompts": prompts(1), "sampling_params": greedy(), **call}
        with pytest.raises(LoraCacheError) as caught:
            ours.generate(**{"lora_request": str(adapters[0]), "use_tqdm": False, **arguments})
        assert type(caught.value).__module__ == "lora_cache.errors"
        assert not any(row.leases for row in ours.snapshot().adapters)
        self.usable(ours, adapters)

    def test_chat_takes_the_adapter_by_position(self, ours: Any) -> None:
        """As vLLM's does; a wrong one shows that it was looked at."""
        with pytest.raises(InvalidAdapterError, match="not a usable path"):
            ours.chat([{"role": "user", "content": "Hello"}], None, False, "./acme\x00/../sql")


def test_inside_a_running_loop_as_in_a_notebook(ours: Any, adapters: list[Path]) -> None:
    async def cell() -> Any:
        return ours.generate(prompts(1), greedy(), lora_request=str(adapters[2]))

    assert texts(asyncio.run(cell())) == texts(
        ours.generate(prompts(1), greedy(), lora_request=str(adapters[2]))
    )


def test_the_largest_named_adapter_sizes_the_slots(adapters: list[Path]) -> None:
    from lora_cache.llm import _rank_for

    def rank_for(*named: Path | str) -> int:
        return asyncio.run(_rank_for(named, CacheConfig()))

    assert rank_for() == 64
    assert rank_for(adapters[0], adapters[3]) == 8  # ranks 4 and 6
    assert rank_for(str(adapters[2])) == 16
    assert asyncio.run(_rank_for(str(adapters[2]), CacheConfig())) == 16, "one, not a list of one"


def test_contradictions_are_found_before_the_engine_starts(tiny_model: Path) -> None:
    from lora_cache import LLM

    with pytest.raises(ConfigError, match="enable_lora"):
        LLM(str(tiny_model), enable_lora=False)
    with pytest.raises(ConfigError, match="drain_after_s"):
        LLM(str(tiny_model), drain_after_s=-1)
