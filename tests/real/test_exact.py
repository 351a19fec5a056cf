"""In float32, what the manager serves is what transformers + peft compute, token by token."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache
from lora_cache.demo.catalogue import adapter_dir
from lora_cache.demo.model import prepare_model
from tests.real.engines import ALIVE, DEMO_MODEL, engine_arguments

pytestmark = [pytest.mark.vllm, DEMO_MODEL]

ADAPTERS = ("pirate", "robot", "detective")  # plain, scale 5/3, and rsLoRA
PROMPT = "What is a volcano?"
TOKENS = 20

# In a process of its own: an in-process vLLM patches torch.
REFERENCE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, tokens, prompt, *adapters = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(base)
chat = [{"role": "user", "content": prompt}]
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
def generate(model):
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=int(tokens), min_new_tokens=int(tokens))
    return out[0, ids.shape[1]:].tolist()
found = {"prompt": ids[0].tolist(), "base": generate(model)}
for number, path in enumerate(adapters):
    if number == 0:
        model = PeftModel.from_pretrained(model, path, adapter_name="0")
    else:
        model.load_adapter(path, adapter_name=str(number))
    model.set_adapter(str(number))
    found[path] = generate(model.float())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def chat_model() -> Path:
    pytest.importorskip("vllm")
    return prepare_model()


def test_tokens_equal_peft_s(chat_model: Path) -> None:
    from vllm import LLM, SamplingParams

    paths = {name: str(adapter_dir(name)) for name in ADAPTERS}
    command = [sys.executable, "-c", REFERENCE, str(chat_model), str(TOKENS), PROMPT]
    done = subprocess.run(
        [*command, *paths.values()], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = json.loads(done.stdout.splitlines()[-1])
    arguments = engine_arguments(
        chat_model,
        skip_tokenizer_init=False,
        max_loras=1,
        max_cpu_loras=2,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=256,
    )
    llm = LLM(**arguments)
    ALIVE.append(llm)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, detokenize=False)

    async def main() -> dict[str, Any]:
        answers = {}
        async with AsyncLoraCache(llm, publish=False) as cache:
            for name in (None, *ADAPTERS):
                adapter = None if name is None else paths[name]
                prompt = {"prompt_token_ids": expected["prompt"]}
                async for output in cache.generate(prompt, params, adapter):
                    answers[name or "base"] = list(output.outputs[0].token_ids)
        return answers

    answers = asyncio.run(main())
    assert answers["base"] == expected["base"]
    for name, path in paths.items():
        assert answers[name] == expected[path], name
    assert len({tuple(tokens) for tokens in answers.values()}) == len(ADAPTERS) + 1
