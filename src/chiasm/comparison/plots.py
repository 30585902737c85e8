"""The comparison's figures as inline SVG, in the style of the run report (`chiasm.evaluation.plots`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from chiasm.evaluation.plots import COLOURS, TONES, canvas, svg

MARKERS = "osD^vP*XdhH<>p"
MOST_TICKS = 4
"""So few whole numbers stand at an axis themselves."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class Point:
    """A way on a plane, with an interval of its height; `style`: its number among all ways, drawn or not."""

    name: str
    x: float
    y: float
    low: float
    high: float
    style: int = 0


def style_of(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the index-th way: every way has another pair of them."""
    tone, dash = TONES[index % len(TONES)], DASHES[index // len(TONES) % len(DASHES)]
    return {"color": tone, "marker": MARKERS[index % len(MARKERS)], "linestyle": dash}


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both: to the left of it and above."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not kept or point.y > kept[-1].y:
            kept.append(point)
    return kept


def pareto(points: Sequence[Point], label: str, name: str, logarithmic: bool = False) -> str | None:
    """Accuracy against a cost, with intervals, and the line of those that are not beaten in both."""
    points = [point for point in points if point.x > 0]
    if not points:
        return None
    logarithmic = logarithmic and max(p.x for p in points) > 3 * min(p.x for p in points)
    figure, axes = canvas(_height(len(points)))
    line = front(points)
    axes.step([p.x for p in line], [100 * p.y for p in line], where="post", color=COLOURS["soft"], linewidth=1.2)
    for point, x in zip(points, side_by_side([p.x for p in points], logarithmic), strict=True):
        style = style_of(point.style)
        reach = [[100 * max(0.0, point.y - point.low)], [100 * max(0.0, point.high - point.y)]]
        mark = {"marker": style["marker"], "color": style["color"], "markersize": 5.5, "capsize": 2, "elinewidth": 1}
        axes.errorbar([x], [100 * point.y], yerr=reach, linestyle="none", label=point.name, **mark)
    if logarithmic:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    values = sorted({p.x for p in points})
    if len(values) <= MOST_TICKS and all(float(value).is_integer() for value in values):
        axes.set_xticks(values, [f"{value:.0f}" for value in values])
    axes.set_xlabel(label)
    axes.set_ylabel("% right")
    _finish(axes, len(points))
    return svg(figure, name, f"Accuracy against {label}")


def side_by_side(values: Sequence[float], logarithmic: bool) -> list[float]:
    """Places on an axis, a little apart where values are equal."""
    inner = [math.log(value) for value in values] if logarithmic else list(values)
    step = 0.018 * (max(inner) - min(inner) or 1.0)
    seen: dict[float, int] = {}
    placed = []
    for value in inner:
        among = seen[value] = seen.get(value, -1) + 1
        placed.append(value + step * (among - (inner.count(value) - 1) / 2))
    return [math.exp(value) for value in placed] if logarithmic else placed


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, name: str, logarithmic: bool = False
) -> str | None:
    """Curves of several ways, told apart by colour, dash and marker: by their places in `series`, where those stand too
    that have no curve here, so that a way looks the same in every figure."""
    styles = {way: style_of(index) for index, way in enumerate(series)}
    series = {way: points for way, points in series.items() if len(points) > 1}
    if not series:
        return None
    figure, axes = canvas(_height(len(series)))
    for way, points in series.items():
        at, heights = zip(*points, strict=True)
        axes.plot(at, heights, label=way, linewidth=1.3, markersize=3.5, **styles[way])
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _finish(axes, len(series))
    return svg(figure, name, f"{y} over {x}")


def skill_bars(rows: Sequence[tuple[str, float, float, float, float | None]], chance: float | None, name: str) -> str:
    """Bars of one skill: way, accuracy, its interval, and the control as a hollow diamond; chance as a line."""
    figure, axes = canvas(0.7 + 0.27 * len(rows))
    for place, (_, accuracy, low, high, control) in enumerate(rows):
        axes.barh(place, 100 * accuracy, height=0.62, color=COLOURS["own"], alpha=0.75)
        reach = [[100 * max(0.0, accuracy - low)], [100 * max(0.0, high - accuracy)]]
        axes.errorbar(
            [100 * accuracy], [place], xerr=reach, color=COLOURS["ink"], linewidth=1, capsize=2, linestyle="none"
        )
        if control is not None:
            style: dict[str, Any] = {"color": COLOURS["control"], "marker": "D", "markersize": 4}
            axes.plot([100 * control], [place], markerfacecolor=COLOURS["paper"], **style)
    if chance is not None:
        axes.axvline(100 * chance, color=COLOURS["muted"], linewidth=1, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], parse_math=False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 102)
    axes.set_xlabel("% right")
    return svg(figure, name, "Accuracy of every way")


def _plain_ticks(axis: Any) -> None:
    """Numbers instead of powers on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _height(number: int) -> float:
    """Inches of a figure whose legend has so many entries, two to a line."""
    return 2.6 + 0.17 * math.ceil(number / 2)


def _finish(axes: Axes, number: int) -> None:
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    style: dict[str, Any] = {
        "frameon": False,
        "fontsize": 7.5,
        "labelcolor": COLOURS["muted"],
        "ncols": 1 + (number > 4),
    }
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), **style)
    for text in legend.get_texts():
        text.set_parse_math(False)
