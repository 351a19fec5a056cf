"""Draw how long requests wait for their first token, from the raw figures of `gpu/serving.py`.

    python -m benchmarks.plot_serving [RAW.json [PICTURE.svg]]

A line for each row that was measured, from the median to the 99th percentile; cold starts beside
warm ones, on one logarithmic axis.  Seeds of the same row lie above each other.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import draw_as_asked
from lora_cache.bench.report import NAMES
from lora_cache.bench.servers import Row
from lora_cache.sim.plots import figures, save

ROOT = Path(__file__).parents[1]
RAW = ROOT / "benchmarks" / "results" / "serving_h100.json"
PICTURE = ROOT / "docs" / "serving.svg"

#: What is compared, the best there can be first; and its colour: Okabe and Ito's.
ORDER = {
    "ideal": "#7F7F7F",
    "free": "#B8C0C8",
    "resident": "#0072B2",
    "vllm": "#D55E00",
    "stock": "#E69F00",
}
STARTS = {
    "warm": "warm: adapters are in host memory",
    "cold": "cold: nothing is above the files",
}

_APART = 0.16  # of a line, between seeds


def lines(raw: Row, start: str) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """(label, server, (median, 99th percentile) of each seed), in the order of the picture."""
    rows = [row for row in raw["rows"] if row["row"] == start]
    found = []
    for rate in sorted({row["rate"] for row in rows}):
        for server in ORDER:
            seeds = [row for row in rows if (row["rate"], row["server"]) == (rate, server)]
            times = [(row["ttft_p50_ms"], row["ttft_p99_ms"]) for row in seeds]
            # One that was never reached is not drawn: the table says so.
            times = [(p50, p99) for p50, p99 in times if p50 and p99]
            if times:
                found.append((f"{NAMES[server]}, {rate:g}/s", server, times))
    return found


def draw(raw: Row, path: Path) -> None:
    """Draw both kinds of start into `path`, an .svg or .png."""
    panels = [(start, found) for start in STARTS if (found := lines(raw, start))]
    heights = [len(found) for _, found in panels]
    with figures() as figure_of:
        figure = figure_of(figsize=(9.6, 1.3 + 0.34 * sum(heights)))
        axes = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for panel, (start, found) in zip(axes[:, 0], panels, strict=True):
            for line, (_, server, times) in enumerate(found):
                for number, (p50, p99) in enumerate(times):
                    at = line + _APART * (number - (len(times) - 1) / 2)
                    panel.plot([p50, p99], [at, at], color=ORDER[server], linewidth=1.6)
                    panel.plot([p50, p99], [at, at], "|", color=ORDER[server], markersize=7)
                worst = max(p99 for _, p99 in times)
                panel.text(worst, line, f"  {worst:,.0f} ms", va="center", fontsize=8.5)
            panel.set_yticks(range(len(found)), [label for label, _, _ in found])
            panel.invert_yaxis()
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.set_title(STARTS[start], loc="left", fontsize=9)
            panel.tick_params(axis="y", length=0)
            panel.margins(x=0.12)
        axes[-1, 0].set_xlabel("milliseconds until the first token: median to 99th percentile")
        save(figure, path)


if __name__ == "__main__":
    draw_as_asked(draw, RAW, PICTURE)
