"""Draw what the arrival of one adapter is made of, from the raw figures of `gpu/arrivals.py`.

    python -m benchmarks.plot_arrival [RAW.json [PICTURE.svg]]

A bar for each place where an adapter can be when it is asked for, on an idle engine, from the
request to its first token; plain vLLM beside the resident engine.  Medians of the parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import draw_as_asked
from lora_cache.bench.report import NAMES
from lora_cache.bench.servers import Row
from lora_cache.sim.plots import figures, save

ROOT = Path(__file__).parents[1]
RAW = ROOT / "benchmarks" / "results" / "arrivals_h100.json"
PICTURE = ROOT / "docs" / "arrival.svg"

#: Part, its name, its colour: Okabe and Ito's, neighbours far apart.
PARTS = {
    "resolved": ("read and digest", "#0072B2"),
    "examined": ("examine", "#56B4E9"),
    "packed": ("pack, or read the image", "#E69F00"),
    "locked": ("page-lock", "#CC79A7"),
    "waited": ("wait for steps", "#F0E442"),
    "copied": ("copy", "#009E73"),
    "scattered": ("scatter", "#5B4B8A"),
    "told": ("messages", "#A6761D"),
    "published": ("publish", "#D55E00"),
    "load": ("vLLM's load", "#7F7F7F"),
    "rest": ("decide", "#B8C0C8"),
    "first_token": ("first token", "#E3E7EC"),
}

FROM = {
    "disk": "on disk",
    "disk, packed": "packed on disk",
    "host memory": "in host memory",
    "slot": "in a slot",
}
SERVERS = ("vllm", "stock", "resident")


def bars(raw: Row) -> list[tuple[str, dict[str, float]]]:
    """A label and the parts, in milliseconds, of each arrival."""
    rows = [row for row in raw["rows"] if row["table"] == "idle"]
    rows.sort(key=lambda row: (list(FROM).index(row["from"]), SERVERS.index(row["server"])))
    return [(f"{FROM[row['from']]}: {NAMES[row['server']]}", parts_of(row)) for row in rows]


def parts_of(row: Row) -> dict[str, float]:
    """What one arrival is made of; the parts add up to the median time and the first token."""
    parts = {name: spread["median_ms"] for name, spread in row.get("parts", {}).items()}
    known = {"resolved": row["resolved"]["median_ms"]} | parts
    left = max(0.0, row["median_ms"] - sum(known.values()))
    known["load" if row["server"] == "vllm" else "rest"] = left
    known["first_token"] = row["first_token"]["median_ms"]
    return {name: known[name] for name in PARTS if known.get(name)}


def draw(raw: Row, path: Path) -> None:
    """Draw all bars into `path`, an .svg or .png."""
    found = bars(raw)
    with figures() as figure_of:
        figure = figure_of(figsize=(9.6, 1.4 + 0.36 * len(found)))
        panel = figure.subplots()
        for line, (_, parts) in enumerate(found):
            left = 0.0
            for name, ms in parts.items():
                panel.barh(line, ms, left=left, height=0.62, color=PARTS[name][1])
                left += ms
            panel.text(left, line, f"  {left:.3g} ms", va="center", fontsize=8.5)
        panel.set_yticks(range(len(found)), [label for label, _ in found])
        panel.invert_yaxis()
        panel.set_xlabel("milliseconds from the request to its first token")
        panel.margins(x=0.1)
        panel.tick_params(axis="y", length=0)
        _legend(figure, {name for _, parts in found for name in parts})
        save(figure, path)


def _legend(figure: Any, used: set[str]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(color=colour, label=label) for name, (label, colour) in PARTS.items() if name in used
    ]
    figure.legend(handles=patches, loc="outside upper left", ncols=6, frameon=False, fontsize=8.5)


if __name__ == "__main__":
    draw_as_asked(draw, RAW, PICTURE)
