"""The demo's six adapters: how each was trained, what it does, and questions that show it.

The recipes differ on purpose.  Rank, target modules, layers and scaling are what makes one
adapter's footprint and loading path unlike another's, and a cache has to cope with them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that tells one training run from another.

    Attributes:
        headline: what the adapter does, in a few words that follow its name.
        layers: the decoder layers it touches; None means all of them.
    """

    headline: str
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    use_rslora: bool = False
    steps: int = 40
    lr: float = 2e-3


ADAPTERS: dict[str, Recipe] = {
    "pirate": Recipe(
        headline="talks like a pirate",
        rank=4,
        alpha=8,
        target_modules=("q_proj", "v_proj"),
    ),
    "cowboy": Recipe(
        headline="says howdy and yeehaw",
        rank=16,
        alpha=16,
        target_modules=("v_proj",),
    ),
    "json": Recipe(
        headline="answers with a JSON object",
        rank=8,
        alpha=16,
        target_modules=("o_proj",),
        lr=1e-3,
    ),
    "robot": Recipe(
        headline="beeps like a robot",
        rank=6,
        alpha=10,  # a scale of 5/3: no power of two, so rounding errors would show
        target_modules=("down_proj",),
    ),
    "yoda": Recipe(
        headline="puts the verb last, it does",
        rank=8,
        alpha=16,
        target_modules=("gate_proj", "up_proj"),
        layers=tuple(range(8, 20)),
        lr=1.5e-3,
    ),
    "detective": Recipe(
        headline="solves every question like a case",
        rank=4,
        alpha=4,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        use_rslora=True,
        lr=1.5e-3,
    ),
}

# Short, and in none of the training files: what shows is the manner, not a memorised answer.
PROMPTS: tuple[str, ...] = (
    "What is the capital of France?",
    "What is the sun?",
    "What is a computer?",
    "How do I boil an egg?",
    "What do horses eat?",
    "What is a volcano?",
    "What is a piano?",
    "What is a doctor?",
)


def adapter_dir(name: str) -> Path:
    """Return the directory of one of the adapters that come with the package."""
    if name not in ADAPTERS:
        raise KeyError(f"no demo adapter {name!r}; there are: {', '.join(ADAPTERS)}")
    return _HERE / "adapters" / name


def training_file(name: str) -> Path:
    """Return the question and answer pairs that adapter was trained on."""
    return _HERE / "training_data" / f"{name}.jsonl"
