"""The result of ``lora-cache bench`` as Markdown, to read or to paste."""

from __future__ import annotations

from lora_cache.bench.servers import Row

#: Column, what is in it.
COLUMNS = {
    "server": "",
    "disk_ms": "disk → slot",
    "packed_ms": "packed → slot",
    "host_ms": "host → slot",
    "slot_ms": "in its slot",
    "gap_disk_ms": "others wait",
    "gap_slot_ms": "(nothing to load)",
    "ttft_p50_ms": "first token p50",
    "ttft_p99_ms": "p99",
    "requests_per_s": "requests/s",
}
NAMES = {
    "ideal": "no loads at all",
    "free": "slots, loads for nothing",
    "vllm": "vLLM",
    "stock": "stock engine",
    "resident": "resident engine",
}


def markdown(found: Row) -> str:
    """A table, and what it was made with.

    Args:
        found: what `small.measure` returned.
    """
    settings, versions = found["settings"], found["versions"]
    size = f"{found['adapter_bytes'] / 1e6:.3g} MB"
    lines = [
        f"{found['model']}, {settings['adapters']} adapters of rank {settings['rank']} ({size}), "
        f"{settings['slots']} slots, {settings['rate']:g} requests/s for "
        f"{settings['seconds']:g} s, seed {settings['seed']}",
        f"{found['machine']}; " + ", ".join(f"{name} {v}" for name, v in versions.items()),
        "",
        *_table(found["servers"]),
        "",
        "Milliseconds, medians. Others wait: the longest gap between two tokens of requests that "
        "decode while one arrives whose adapter is on disk, and one whose adapter is in a slot.",
    ]
    return "\n".join(lines)


def _table(rows: list[Row]) -> list[str]:
    cells = [
        [NAMES[row["server"]], *(_shown(row.get(name)) for name in list(COLUMNS)[1:])]
        for row in rows
    ]
    heads = list(COLUMNS.values())
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]

    def line(texts: list[str]) -> str:
        first, *rest = (text.rjust(width) for text, width in zip(texts, widths, strict=True))
        return "| " + " | ".join([texts[0].ljust(len(first)), *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(heads), "| " + " | ".join(rule) + " |", *map(line, cells)]


def _shown(number: float | None) -> str:
    """Three digits are more than two runs agree on."""
    if number is None:
        return "–"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
