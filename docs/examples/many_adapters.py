"""The usual multi-LoRA script, with only the import changed: `LLM` comes from lora_cache.

Load one base model, ask adapter A, then B, then A again, then B again.  Adapters are named by plain
strings; a third one would need no change either.
"""

import sys

from vllm import SamplingParams

from lora_cache import LLM


def main(model: str, first: str, second: str) -> None:
    llm = LLM(model, max_loras=1, enforce_eager=True, max_model_len=512, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=24)
    question = [{"role": "user", "content": "What is the sun?"}]

    for adapter in (first, second, first, second):
        (output,) = llm.chat(question, params, use_tqdm=False, lora_request=adapter)
        print(output.outputs[0].text)

    print(llm.stats())


if __name__ == "__main__":  # vLLM starts its engine as a process, which imports this file
    main(*sys.argv[1:4])
