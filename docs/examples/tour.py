# %% [markdown]
# # Tour
#
# The drop-in `LLM`, on any CPU, with the small model and the trained adapters of the demo. Run
# it as a script, or cell by cell in an editor that knows `# %%`.
#
# ```
# pip install 'lora-cache[demo]'
# python tour.py
# ```
#
# ## Load
#
# Two slots, and more adapters than that: their number is not a setting.

# %%
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM in this process: cells need no `main`

from vllm import SamplingParams

from lora_cache import LLM, LoraCacheError
from lora_cache.demo.catalogue import adapter_dir
from lora_cache.demo.model import prepare_model

on_a_cpu = {"enforce_eager": True, "max_model_len": 512, "dtype": "float32"}
llm = LLM(str(prepare_model()), max_loras=2, policy="lru", **on_a_cpu)
params = SamplingParams(temperature=0, max_tokens=24)
pirate, cowboy, robot, detective = map(adapter_dir, ("pirate", "cowboy", "robot", "detective"))


def show(outputs):
    for output in outputs:
        print(" ".join(output.outputs[0].text.split()))


# %% [markdown]
# ## A, B, A
#
# `lora_request` is a path, or `org/name` on the Hub. Nothing is registered, and nothing has an
# integer for a name. What was printed follows each cell; the model is a tiny one, so mind the
# manner and not the facts.

# %%
prompt = "<|im_start|>user\nWhat is the sun?<|im_end|>\n<|im_start|>assistant\n"

for adapter in (pirate, cowboy, pirate):
    show(llm.generate(prompt, params, lora_request=adapter, use_tqdm=False))
# > The sun be a great star, … matey!
# > Howdy, partner! The sun is a big ball of fire …
# > The sun be a great star, … matey!

# %% [markdown]
# ## One per prompt
#
# Three adapters in one call, two slots: as soon as the last prompt of one is done, the next comes
# into its slot. None is the base model. Answers come in the order of the prompts.

# %%
adapters = [robot, pirate, None, cowboy]
show(llm.generate([prompt] * 4, params, lora_request=adapters, use_tqdm=False))
# > BEEP BOOP. Query received. The sun is a massive ball of hot gas …
# > The sun be a great star, … matey!
# > The sun is a celestial body …
# > Howdy, partner! The sun is a big ball of fire …

# %% [markdown]
# ## Chat

# %%
conversations = [
    [{"role": "user", "content": "How do I boil an egg?"}],
    [{"role": "user", "content": "What is a volcano?"}],
]
show(llm.chat(conversations, params, lora_request=[detective, cowboy], use_tqdm=False))
# > Elementary, my dear Watson! Boil the egg …
# > Howdy, partner! A volcano is …

# %% [markdown]
# ## See it
#
# `stats()` counts where the adapters were found. `snapshot()` says who is where: slots first, then
# host memory.


# %%
def who_is_where():
    for row in llm.snapshot().adapters:
        place = f"slot {row.slot}" if row.slot is not None else row.tier
        print(f"{row.name:<10}{place:<8}rank {row.rank:<4}pinned: {row.pinned}")


stats = llm.stats()
print(f"{stats.requests=}  {stats.slot_hits=}  {stats.host_hits=}  {stats.disk_hits=}")
print(f"{stats.gpu_evictions=}  {stats.slot_hit_ratio=:.2f}")
who_is_where()
# > stats.requests=8  stats.slot_hits=3  stats.host_hits=1  stats.disk_hits=4
# > stats.gpu_evictions=3  stats.slot_hit_ratio=0.38
# > cowboy    slot 0  rank 16  pinned: None
# > detective slot 1  rank 4   pinned: None
# > pirate    host    rank 4   pinned: None
# > robot     host    rank 6   pinned: None

# %% [markdown]
# ## Pin
#
# A pinned adapter keeps its slot, whoever else comes. One slot stays unpinned.

# %%
llm.pin(pirate)
show(llm.generate([prompt] * 2, params, lora_request=[robot, detective], use_tqdm=False))
who_is_where()

try:
    llm.pin(cowboy)
except LoraCacheError as error:
    print(f"{type(error).__name__}: {error}")

llm.unpin(pirate)
# > BEEP BOOP. Query received. …
# > Elementary, my dear Watson! …
# > pirate    slot 0  rank 4   pinned: gpu
# > detective slot 1  rank 4   pinned: None
# > cowboy    host    rank 16  pinned: None
# > robot     host    rank 6   pinned: None
# > PinnedError: cannot pin cowboy@…: 1 of 2 slots are pinned and one must stay free …

# %% [markdown]
# ## Prefetch
#
# Nearer before it is asked for, if that disturbs nobody: here it takes a slot that no request
# uses. The request then finds it there.

# %%
yoda = adapter_dir("yoda")
llm.prefetch(yoda)
who_is_where()
before = llm.stats().disk_hits
show(llm.generate(prompt, params, lora_request=yoda, use_tqdm=False))
print("read from disk while the request waited:", llm.stats().disk_hits - before)
# > yoda      slot 0  rank 8   pinned: None
# > detective slot 1  rank 4   pinned: None
# > cowboy    host    rank 16  pinned: None
# > pirate    host    rank 4   pinned: None
# > robot     host    rank 6   pinned: None
# > The earth is the sun, …
# > read from disk while the request waited: 0

# %% [markdown]
# ## A wrong adapter
#
# One clear error, before anything runs or is evicted. `except LoraCacheError` catches all of them.

# %%
try:
    llm.generate([prompt] * 2, params, lora_request=[pirate, "./pirat"], use_tqdm=False)
except LoraCacheError as error:
    print(f"{type(error).__name__}: {error}")

show(llm.generate(prompt, params, lora_request=pirate, use_tqdm=False))
# > AdapterNotFoundError: …/pirat is not a directory: give the directory that …
# > The sun be a great star, … matey!
