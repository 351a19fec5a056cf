"""Write the tables of docs/performance.md from the raw figures in benchmarks/results.

    python -m benchmarks.performance

Each table stands between two markers, ``<!-- NAME -->`` and ``<!-- /NAME -->``.  Those whose raw
file is not there are left as they are.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.lora_kernels import steps
from benchmarks.gpu.slo import highest
from benchmarks.plot_arrival import FROM, PARTS, PICTURE, parts_of
from lora_cache.bench.models import LLAMA_8B
from lora_cache.bench.report import NAMES
from lora_cache.bench.servers import Row

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

BESIDE = {
    "cold": "on disk",
    "packed": "packed on disk",
    "host": "in host memory",
    "slot": "in a slot: nothing to load",
    "busy": "in use by those that decode",
}


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; numbers get three digits, and None a dash."""
    lines = [heads, ["---"] * len(heads), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine(raw: Row, file: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in raw["versions"].items())
    return (
        f"{raw['device']}, {raw['cores']} cores; {versions}. "
        f"Raw: `benchmarks/results/{file}`, from\n\n```\n{raw['command']}\n```"
    )


# ---------------------------------------------------------------------- the tables


def arrivals(raw: Row) -> str:
    """Into a slot on an idle engine, and what that is made of."""
    rows = [row for row in raw["rows"] if row["table"] == "idle"]
    heads = ["the adapter is", "served by", "ms, median", "ninth decile", "longest"]
    shown = [
        [FROM[row["from"]], NAMES[row["server"]], row["median_ms"], row["p90_ms"], row["max_ms"]]
        for row in rows
    ]
    parts = [(row, parts_of(row)) for row in rows if row.get("parts")]
    used = [name for name in PARTS if any(name in found for _, found in parts)]
    made_of = table(
        ["of the resident engine, ms", *(FROM[row["from"]] for row, _ in parts)],
        [[PARTS[name][0], *(found.get(name) for _, found in parts)] for name in used],
    )
    picture = f"![What the arrival of an adapter is made of]({PICTURE.name})"
    found = [table(heads, shown), *([made_of] if parts else [])]
    return "\n\n".join([*found, *([picture] if PICTURE.exists() else [])])


def beside(raw: Row) -> str:
    """What others notice, and how soon the one that arrives is answered."""
    rows = []
    for row in raw["rows"]:
        gap, first = row.get("longest_gap"), row.get("first_token", {}).get("median_ms")
        if row["table"] in ("beside", "ten in a second"):
            many = "; ten in a second" if row["table"] != "beside" else ""
            head = [BESIDE[row["from"]] + many, NAMES[row["server"]]]
            rows.append([*head, gap["median_ms"], gap["max_ms"], first])
    heads = ["the adapter is", "served by", "others' longest gap, ms", "the longest of all"]
    return table([*heads, "its first token, ms"], rows)


def serving(raw: Row) -> str:
    """Many adapters, at several rates."""
    rows = sorted(raw["rows"], key=lambda row: (row["row"], row["rate"], row["seed"]))
    times = ("ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p999_ms", "requests_per_s")
    heads = ["start", "requests/s asked", "seed", "served by", "first token p50, ms", "p99"]
    found = table(
        [*heads, "gap p50", "p99.9", "requests/s done"],
        [
            [_start(row), row["rate"], str(row["seed"]), NAMES[row["server"]]]
            + [row[name] for name in times]
            for row in rows
        ],
    )
    heads = ["resident engine", "against", "first token p99", "gap p99.9", "requests/s"]
    pairs = (("warm", "ideal"), ("warm", "free"), ("warm", "vllm"), ("cold", "vllm"))
    compared = [line for kind, other in pairs for line in _compared(rows, kind, other)]
    return f"{found}\n\n{table(heads, compared)}" if compared else found


def warm(raw: Row) -> str:
    """The warm rows of a measurement that had others, too."""
    return serving({"rows": [row for row in raw["rows"] if row["row"] == "warm"]})


def _start(row: Row) -> str:
    return f"{row['row']}, disk" if "page_cache" in row else row["row"]


def _compared(rows: Sequence[Row], kind: str, other: str) -> Iterator[list[str]]:
    """How many times as much the resident engine has as another server, seed by seed."""
    of = {(row["server"], row["rate"], row["seed"]): row for row in rows if row["row"] == kind}
    for rate in sorted({row["rate"] for row in rows}):
        seeds = [seed for server, its, seed in of if (server, its) == (other, rate)]
        pairs = [(of.get(("resident", rate, seed)), of[other, rate, seed]) for seed in seeds]
        shown = []
        for name in ("ttft_p99_ms", "gap_p999_ms", "requests_per_s"):
            values = [(ours[name], its[name]) for ours, its in pairs if ours is not None]
            shown.append(", ".join(f"{a / b:.2f}" if a and b else "–" for a, b in values))
        if any(shown):
            yield [f"{kind}, {rate:g}/s", NAMES[other], *shown]


def slo(raw: Row) -> str:
    """The load that fits under the promise."""
    times = ("ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms", "requests_per_s")
    heads = ["served by", "requests/s asked", "first token p50, ms", "p99", "gap p50", "p99"]
    rows = raw["rows"]
    shown = [
        [
            *(NAMES[row["server"]], row["rate"], *(row[name] for name in times)),
            "kept" if row["kept"] else "broken",
        ]
        for row in rows
    ]
    best = highest(rows)
    promise = f"Promised: 99 of 100 first tokens within {rows[-1]['promise_ms']:.0f} ms."
    kept = [
        f"{NAMES[name]}: {best[name]:g} requests/s" if name in best else f"{NAMES[name]}: none"
        for name in dict.fromkeys(row["server"] for row in rows)
    ]
    found = table([*heads, "requests/s done", "promise"], shown)
    return f"{found}\n\n{promise} The highest rate that keeps it: {'; '.join(kept)}."


def kernels(raw: Row) -> str:
    """What adapters add to a step."""
    heads = ["tokens in a step", "by default, ms", "as found best", "times faster"]
    rows = steps(raw["rows"], raw.get("layers", LLAMA_8B["num_hidden_layers"]))
    return table(heads, [[str(n), before, best, before / best] for n, before, best, _ in rows])


#: Marker, the raw file, what makes the table.
TABLES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "arrivals": ("arrivals_h100.json", arrivals),
    "beside": ("arrivals_h100.json", beside),
    "serving": ("serving_h100.json", serving),
    "serving-seed-1": ("serving_seed1_h100.json", serving),
    "kernels": ("lora_kernels_h100.json", kernels),
    "serving-tuned": ("serving_tuned_h100.json", warm),
    "serving-tuned-seed-2": ("serving_tuned_seed2_h100.json", serving),
    "serving-tuned-cold": ("serving_tuned_cold_h100.json", serving),
    "serving-tuned-disk": ("serving_tuned_disk_h100.json", serving),
    "serving-small-graphs": ("serving_small_graphs_h100.json", serving),
    "serving-8-slots": ("serving_8_slots_h100.json", serving),
    "serving-thousand": ("serving_thousand_h100.json", serving),
    "slo": ("slo_h100.json", slo),
}


def made(results: Path = RESULTS) -> dict[str, str]:
    """What stands between the markers, for the raw files that are there."""
    found = {}
    for name, (file, make) in TABLES.items():
        if (path := results / file).exists():
            raw = json.loads(path.read_text())
            found[name] = f"{make(raw)}\n\n{machine(raw, file)}"
    return found


def between(page: str, name: str) -> re.Match[str]:
    """What a page has between the markers of a table.

    Raises:
        ValueError: the page has no such markers.
    """
    found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", page, re.DOTALL)
    if found is None:
        raise ValueError(f"no markers of {name!r}")
    return found


def written(page: str, tables: dict[str, str]) -> str:
    """The page with these tables in it."""
    for name, text in tables.items():
        place = between(page, name)
        page = f"{page[: place.start()]}\n{text}\n\n{page[place.end() :]}"
    return page


def main() -> int:
    tables = made()
    PAGE.write_text(written(PAGE.read_text(), tables))
    print(f"{PAGE}: {', '.join(tables) or 'nothing to write'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
