"""Pictures of simulations.  matplotlib is imported only where one is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cache.errors import ConfigError, MissingExtraError
from lora_cache.sim.rows import Row
from lora_cache.sim.timeline import IN_HOST, IN_SLOT, NOWHERE, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, told apart also by the colour-blind; the first ones are the darkest.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A", "#7F7F7F")
_MARKERS = "osD^vPXh"
_FLOOR, _INK, _FAINT = "#E3E7EC", "#1F2933", "#8A94A0"
_TIER_COLOURS = {NOWHERE: "#F1F3F5", IN_HOST: "#A9C9E8", IN_SLOT: "#D55E00"}
_TIER_NAMES = {IN_SLOT: "in a slot", IN_HOST: "in host memory", NOWHERE: "on disk"}


def check_path(path: Path) -> None:
    """Find out before anything long is begun whether a picture can be drawn into `path`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the name ends in neither .svg nor .png, or its directory does not exist.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"{path}: a picture is a .svg or .png file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no directory {path.parent}")
    with figures():
        pass


def plot_misses(rows: Sequence[Row], path: Path) -> None:
    """Draw the miss ratio over the number of slots: a panel for each trace, a line a policy.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: `path` cannot be written.
    """
    by_trace: dict[str, list[Row]] = {}
    for row in rows:
        by_trace.setdefault(row.trace, []).append(row)
    policies = list(dict.fromkeys(row.policy for row in rows if row.policy != "belady"))
    with figures() as figure_of:
        across = min(len(by_trace), 3)
        down = -(-len(by_trace) // across)
        figure: Figure = figure_of(figsize=(0.6 + 4.5 * across, 0.5 + 3.3 * down))
        axes = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
        axes[0].set_ylim(0, 106 * max(row.miss_ratio for row in rows) or 1)
        titles = _titles(by_trace)
        for panel, title, mine in zip(axes, titles, by_trace.values(), strict=False):
            _draw_misses(panel, title, mine, policies)
            panel.tick_params(labelleft=True)
        for panel in axes[len(by_trace) :]:
            panel.remove()
        for panel in axes[: len(by_trace) : across]:
            panel.set_ylabel("requests that miss the slots")
        for panel in axes[max(0, len(by_trace) - across) : len(by_trace)]:
            panel.set_xlabel("GPU slots")
        save(figure, path)


def plot_timeline(timeline: Timeline, path: Path) -> None:
    """Draw which adapter was in which tier, over time.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: `path` cannot be written.
    """
    with figures() as figure_of:
        from matplotlib.colors import ListedColormap

        count = len(timeline.adapters)
        figure: Figure = figure_of(figsize=(9.6, 1.9 + 0.125 * count))
        above, below = figure.subplots(
            2, 1, sharex=True, height_ratios=(0.9, 0.125 * count), gridspec_kw={"hspace": 0.05}
        )
        scale, unit = _time_unit(timeline.end_s - timeline.start_s)
        start, end = timeline.start_s / scale, timeline.end_s / scale
        _draw_miss_strip(above, timeline, start, end)
        pixels = [list(row) for row in timeline.tiers]
        below.imshow(
            pixels,
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap([_TIER_COLOURS[tier] for tier in sorted(_TIER_COLOURS)]),
            vmin=NOWHERE,
            vmax=IN_SLOT,
            extent=(start, end, count - 0.5, -0.5),
        )
        below.set_yticks(range(count), timeline.adapters, fontsize=6.5)
        below.tick_params(axis="y", length=0, pad=2)
        below.hlines(
            [line + 0.5 for line in range(count - 1)], start, end, colors="white", linewidth=0.8
        )
        below.set_xlabel(f"time ({unit})")
        below.spines[["left", "bottom"]].set_visible(False)
        _tier_legend(figure, timeline)
        save(figure, path)


# ---------------------------------------------------------------------- parts of the pictures


def _draw_misses(panel: Axes, title: str, rows: list[Row], policies: list[str]) -> None:
    slots = sorted({row.gpu_slots for row in rows})
    panel.set_title(title, loc="left", fontweight="bold")
    panel.set_xscale("log", base=2)
    panel.set_xticks(slots, [str(number) for number in slots])
    panel.minorticks_off()
    ends: list[tuple[float, str, str]] = []
    floor = {
        row.gpu_slots: row.belady_gpu_misses / row.requests
        for row in rows
        if row.belady_gpu_misses is not None
    }
    if floor:
        lowest = [100 * floor[number] for number in slots]
        panel.fill_between(slots, 0, lowest, color=_FLOOR, linewidth=0)
        panel.plot(slots, lowest, color=_FAINT, linewidth=1, linestyle=(0, (3, 2)))
        ends.append((lowest[-1], "Belady", _FAINT))
        if all(row.hold == "none" for row in rows):  # else it is no bound
            panel.text(
                0.03, 0.03, "out of reach of any policy", transform=panel.transAxes, color=_FAINT
            )
    for number, policy in enumerate(policies):
        colour = _COLOURS[number % len(_COLOURS)]
        points = sorted((r.gpu_slots, 100 * r.miss_ratio) for r in rows if r.policy == policy)
        panel.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=1.8,
        )
        ends.append((points[-1][1], policy, colour))
    panel.margins(x=0.04)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    panel.grid(axis="y", color="#E9ECEF", linewidth=0.8)
    panel.set_axisbelow(True)
    _label_ends(panel, slots[-1], ends)


def _label_ends(panel: Axes, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Write each line's name where it ends, moved up or down where names would overlap."""
    bottom, top = panel.get_ylim()
    # A line of text in units of y; the layout is not made yet, so the panel's height is a guess.
    gap = (top - bottom) * 0.058
    ends.sort()
    heights = spread([end for end, _, _ in ends], gap)
    for y, (end, name, colour) in zip(heights, ends, strict=True):
        panel.annotate(
            name,
            (x, end),
            xytext=(1.06, (y - bottom) / (top - bottom)),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            fontweight="normal" if colour == _FAINT else "bold",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 4,
            },
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in order, as near as can be to the `wanted` ones (ascending).

    Neighbours that are too close are moved apart by the same distance either way.
    """
    groups: list[tuple[float, int]] = []  # the centre of each group of touching places, its size
    for place in wanted:
        groups.append((place, 1))
        while len(groups) > 1:
            (low, below), (high, above) = groups[-2:]
            if high - low >= gap * (below + above) / 2:
                break
            groups[-2:] = [((low * below + high * above) / (below + above), below + above)]
    return [
        centre + gap * (number - (size - 1) / 2)
        for centre, size in groups
        for number in range(size)
    ]


def _draw_miss_strip(panel: Axes, timeline: Timeline, start: float, end: float) -> None:
    """The miss ratio over time, smoothed over one fiftieth of it."""
    ratios = timeline.miss_ratios
    width = max(1, len(ratios) // 50)
    smooth = []
    for column in range(len(ratios)):
        near = [r for r in ratios[max(0, column - width + 1) : column + 1] if r is not None]
        smooth.append(100 * sum(near) / len(near) if near else float("nan"))
    step = (end - start) / len(ratios)
    times = [start + (column + 0.5) * step for column in range(len(ratios))]
    panel.fill_between(times, smooth, color=_FLOOR, linewidth=0)
    panel.plot(times, smooth, color=_INK, linewidth=1)
    panel.set_ylim(0, max(10.0, 1.1 * max(s for s in smooth if s == s)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    panel.set_ylabel("misses")
    panel.tick_params(axis="x", length=0)
    panel.spines["bottom"].set_visible(False)


def _tier_legend(figure: Figure, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    others = f", the {len(timeline.adapters)} busiest adapters" if timeline.others else ""
    figure.suptitle(
        f"{_short(timeline.trace)}: {timeline.policy}, {timeline.gpu_slots} slots{others}",
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=11,
    )
    figure.legend(
        handles=[
            Patch(color=_TIER_COLOURS[tier], label=text) for tier, text in _TIER_NAMES.items()
        ],
        loc="outside upper right",
        ncols=3,
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.4,
        fontsize=9,
    )


def _titles(traces: Iterable[str]) -> list[str]:
    """Short titles, unless they would be the same."""
    traces = list(traces)
    short = [_short(trace) for trace in traces]
    return short if len(set(short)) == len(short) else traces


def _short(trace: str) -> str:
    """A trace's name as a title: a file without its directories, a spec without its settings."""
    kind, colon, _ = trace.partition(":")
    return kind if colon and "/" not in kind else Path(trace).name.split(".")[0]


def _time_unit(seconds: float) -> tuple[float, str]:
    for limit, scale, unit in (
        (300, 1, "s"),
        (4 * 3600, 60, "minutes"),
        (4 * 86_400, 3600, "hours"),
    ):
        if seconds <= limit:
            return scale, unit
    return 86_400, "days"


@contextmanager
def figures() -> Iterator[Any]:
    """Something that makes figures in our style, and draws into files only.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure as NewFigure
    except ImportError as error:
        raise MissingExtraError(
            "pictures need matplotlib: pip install 'lora-cache[plot]'"
        ) from error
    style: Any = {
        "font.size": 9.5,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "svg.hashsalt": "lora-cache",  # the same picture is the same file
    }
    with mpl.rc_context(style):
        yield NewFigure


def save(figure: Figure, path: Path) -> None:
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
    try:
        figure.savefig(path, metadata=metadata)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
