"""Train the demo's adapters: ``python -m lora_cache.demo.training [NAME ...] --out DIR``.

A dozen question and answer pairs and a few dozen steps on a CPU teach the 135M model a manner
of speaking in well under a minute.  The adapters that ship with the package were made by this
module, so anyone can make them again, or add another: a recipe in ``catalogue.py`` and a file
in ``training_data/`` are all it takes.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_cache.demo.catalogue import ADAPTERS, Recipe, training_file
from lora_cache.demo.model import BASE_MODEL, prepare_model
from lora_cache.errors import MissingExtraError

_SEED = 20
_BATCH = 4
_IGNORED = -100  # the label that torch's cross entropy skips

_log = logging.getLogger(__name__)


def train(name: str, out: Path, *, base: Path | None = None) -> Path:
    """Train one adapter of the catalogue and return its directory, ``out / name``.

    Args:
        base: the checkpoint to train on; default what :func:`prepare_model` returns.

    Raises:
        MissingExtraError: torch, transformers, peft or safetensors is not installed.
    """
    for package in ("torch", "transformers", "peft", "safetensors"):
        if find_spec(package) is None:
            raise MissingExtraError(
                f"training needs the package {package!r}, which is not installed: "
                "pip install 'lora-cache[demo]' peft"
            )

    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = ADAPTERS[name]
    base = base or prepare_model()
    torch.manual_seed(_SEED)  # lora_A starts at random
    tokenizer = AutoTokenizer.from_pretrained(base)
    # float32: a few dozen small steps would drown in bf16 rounding.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, _lora_config(recipe))
    _fit(model, _examples(name, tokenizer), recipe)

    target = out / name
    _save(model, target)
    return target


def _lora_config(recipe: Recipe) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        layers_to_transform=list(recipe.layers) if recipe.layers is not None else None,
        use_rslora=recipe.use_rslora,
        lora_dropout=0.0,  # dropout would only make so short a run noisier
    )


def _examples(name: str, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return (token ids, labels) for every pair, the question's tokens left out of the loss."""
    examples = []
    for line in training_file(name).read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        # Tokenised in two pieces, as in serving: the answer starts on a token of its own.
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": pair["question"]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        question = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(pair["answer"] + tokenizer.eos_token, add_special_tokens=False).input_ids
        examples.append((question + answer, [_IGNORED] * len(question) + answer))
    return examples


def _fit(model: Any, examples: list[tuple[list[int], list[int]]], recipe: Recipe) -> None:
    import torch

    rng = random.Random(_SEED)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=recipe.steps)
    model.train()
    queue: list[tuple[list[int], list[int]]] = []
    for step in range(recipe.steps):
        if len(queue) < _BATCH:
            queue += rng.sample(examples, len(examples))
        batch, queue = queue[:_BATCH], queue[_BATCH:]
        width = max(len(ids) for ids, _ in batch)
        # Padded on the right and never looked at: attention is causal, the labels are ignored.
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([lab + [_IGNORED] * (width - len(lab)) for _, lab in batch])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == recipe.steps - 1:
            _log.info("  step %3d  loss %.3f", step, loss.item())


def _save(model: Any, target: Path) -> None:
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    # Not model.save_pretrained(): it adds a model card and this machine's path to the base.
    config = model.peft_config["default"].to_dict()
    config.update(base_model_name_or_path=BASE_MODEL, inference_mode=True)
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    state = get_peft_model_state_dict(model)
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in state.items()}

    target.mkdir(parents=True, exist_ok=True)
    (target / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    # Not save_file(): it makes the file unreadable for everyone but its owner.
    (target / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def main(argv: list[str] | None = None) -> None:
    """Train the named adapters, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m lora_cache.demo.training")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(ADAPTERS)}")
    parser.add_argument("--out", type=Path, required=True, help="where the adapters go")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - ADAPTERS.keys())
    if unknown:
        parser.error(f"no such adapter: {', '.join(unknown)}")

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in args.names or ADAPTERS:
        _log.info("%s: %s", name, ADAPTERS[name].headline)
        start = time.perf_counter()
        target = train(name, args.out)
        _log.info("  %s in %.0f s", target, time.perf_counter() - start)


if __name__ == "__main__":
    main()
