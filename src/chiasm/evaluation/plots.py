"""The report's figures as inline SVG, and its thumbnails.

Text in a figure stays text, and its colours are CSS variables, so that it follows the page's theme; lines and marks
differ in dash and shape, not colour alone. Drawn with matplotlib's object API: nothing global changes.
"""

import base64
import math
import re
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO, StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from chiasm.rgb import to_rgb

Pictures = Callable[[str], Image.Image | None]

COLOURS = {
    "ink": "#000001",
    "muted": "#000002",
    "line": "#000003",
    "own": "#000004",
    "control": "#000005",
    "soft": "#000006",
    "paper": "#000007",
    "leaf": "#000008",
    "plum": "#000009",
    "teal": "#00000a",
}
TONES = tuple(COLOURS[name] for name in ("own", "control", "leaf", "plum", "teal", "muted"))
"""Of several curves in one figure."""
MAX_POINTS = 240
MAX_PICTURES = 96
_PICTURE_PIXELS = 240
_PICTURE_BUDGET = 1_900_000  # bytes of all pictures before base64, which adds a third
_WIDTH = 4.4  # inches: 422 CSS pixels at full size, still readable when a phone shows it at 340
_FONT_SIZE = 9.5


def loss_curves(train: Sequence[tuple[int, float]], validation: Sequence[dict[str, Any]], name: str) -> str | None:
    """One stage: training loss (raw and smoothed), validation loss, and validation loss with another sample's picture.

    Args:
        train: step and loss.
        validation: `validation` events of the run log with `step`, `loss` and perhaps `shuffled_loss`.
        name: makes the ids inside the SVG unique on the page.

    Returns None without anything to draw. Points that are not finite are left out.
    """
    train = [(step, loss) for step, loss in train if math.isfinite(loss)]
    own, control = _series(validation, "loss"), _series(validation, "shuffled_loss")
    if not train and not own:
        return None
    figure, axes = canvas(2.65)
    if train:
        steps, losses = _binned(train)
        axes.plot(steps, losses, color=COLOURS["soft"], linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=COLOURS["muted"], linewidth=1.5)
    if control:
        axes.plot(
            *zip(*control, strict=True), color=COLOURS["control"], linestyle=(0, (4, 2)), marker="D", markersize=3.5
        )
    if own:
        axes.plot(*zip(*own, strict=True), color=COLOURS["own"], linewidth=1.6, marker="o", markersize=4)
    axes.set_ylim(*_limits([loss for _, loss in train], [loss for _, loss in (*own, *control)]))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    return svg(figure, name, "Loss over the steps of the stage")


def gate_openness(moments: Sequence[dict[str, Any]], name: str) -> str | None:
    """Over the layers that have a block, how far its gates are open: attention's and the feed-forward's at the last
    moment, attention's at earlier ones.

    Args:
        moments: `gates` of the run log in order, each `{"layers", "attention_gate", "feed_forward_gate"}`.
        name: makes the ids inside the SVG unique on the page.
    """
    if not moments:
        return None
    figure, axes = canvas(2.2)
    layers, last = moments[-1]["layers"], moments[-1]
    axes.axhline(0, color=COLOURS["line"], linewidth=0.8)
    for moment in moments[:-1]:
        axes.plot(layers, moment["attention_gate"], color=COLOURS["soft"], linewidth=0.8)
    style: dict[str, Any] = {"color": COLOURS["control"], "linestyle": (0, (4, 2)), "marker": "D", "markersize": 3.5}
    axes.plot(layers, last["feed_forward_gate"], **style)
    axes.plot(layers, last["attention_gate"], color=COLOURS["own"], linewidth=1.6, marker="o", markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("layer")
    axes.set_ylabel("gate, tanh")
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    return svg(figure, name, "How far the gates of every layer are open")


def skill_curves(progress: dict[str, list[tuple[int, float, int]]], name: str = "progress") -> str | None:
    """Per skill the share of right answers over the steps of the run, told apart by marker and dash.

    Args:
        progress: skill → step, share and number of answers, as `skill_progress` gives them.
    """
    if not progress:
        return None
    figure, axes = canvas(2.65)
    for index, (skill, moments) in enumerate(progress.items()):
        style: dict[str, Any] = {"color": TONES[index % 6], "marker": "oD^sv*"[index % 6], "markersize": 4}
        style["linestyle"] = "-" if index % 2 == 0 else (0, (4, 2))
        label = f"{skill if len(skill) <= 22 else skill[:21] + '…'} ({moments[-1][2]})"
        axes.plot([m[0] for m in moments], [100 * m[1] for m in moments], label=label, linewidth=1.4, **style)
    axes.set_ylim(-4, 104)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step of the run")
    axes.set_ylabel("% of validation answers right")
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    legend = axes.legend(frameon=False, fontsize=_FONT_SIZE - 1, labelcolor=COLOURS["muted"], loc="upper left")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return svg(figure, name, "Right answers per skill as training went on")


def skill_intervals(summary: Sequence[dict[str, Any]], name: str = "skills") -> str | None:
    """Per skill the accuracy with its interval (disc), the control's (hollow diamond) and chance (bar), 0 to 100 %."""
    if not summary:
        return None
    figure, axes = canvas(0.75 + 0.42 * len(summary))
    for place, row in enumerate(summary):
        if row["chance"] is not None:
            chance = 100 * row["chance"]
            axes.plot([chance, chance], [place - 0.3, place + 0.3], color=COLOURS["muted"], linewidth=1.8)
        if row["control_accuracy"] is not None:
            values = row["control_accuracy"], row["control_low"], row["control_high"]
            _interval(axes, place + 0.17, *values, COLOURS["control"], "D", COLOURS["paper"])
        _interval(axes, place - 0.17, row["accuracy"], row["low"], row["high"], COLOURS["own"], "o", COLOURS["own"])
    for edge in range(1, len(summary)):
        axes.axhline(edge - 0.5, color=COLOURS["line"], linewidth=0.6, zorder=0)
    names = [row["skill"] if len(row["skill"]) <= 22 else row["skill"][:21] + "…" for row in summary]
    axes.set_yticks(range(len(summary)), names, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(summary) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("% correct")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.6)
    return svg(figure, name, "Accuracy per skill with 95 % intervals, beside the control and chance")


def _interval(axes: Axes, y: float, mean: float, low: float, high: float, colour: str, marker: str, fill: str) -> None:
    reach = [[max(0.0, 100 * (mean - low))], [max(0.0, 100 * (high - mean))]]
    style: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "markerfacecolor": fill,
        "markersize": 5,
        "capsize": 2.5,
    }
    axes.errorbar([100 * mean], [y], xerr=reach, linewidth=1.4, linestyle="none", **style)


def _series(events: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    found = ((event["step"], event[key]) for event in events if event.get(key) is not None)
    return [(step, value) for step, value in found if math.isfinite(value)]


def _binned(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` means of neighbouring points, so that a long run makes no large file."""
    pieces = np.array_split(np.asarray(points, dtype=np.float64), min(len(points), MAX_POINTS))
    means = np.stack([piece.mean(axis=0) for piece in pieces])
    return means[:, 0], means[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twelfth of the curve, narrower at its ends."""
    half = len(values) // 24
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _limits(train: Sequence[float], validation: Sequence[float]) -> tuple[float, float]:
    """Room for everything but the highest few training losses, which would flatten the rest."""
    top = max([float(np.quantile(train, 0.985)) if train else -math.inf, *validation])
    bottom = min([*train, *validation])
    room = 0.06 * (top - bottom) or 0.5
    return max(0.0, bottom - room) if bottom >= 0 else bottom - room, top + room


def canvas(height: float) -> tuple[Figure, Axes]:
    """An empty figure without a frame, so high in inches."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLOURS["line"])
    axes.tick_params(colors=COLOURS["line"], labelcolor=COLOURS["muted"], labelsize=_FONT_SIZE, width=0.8)
    axes.xaxis.label.set(color=COLOURS["muted"], fontsize=_FONT_SIZE)
    axes.yaxis.label.set(color=COLOURS["muted"], fontsize=_FONT_SIZE)
    return figure, axes


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure's SVG element alone: no prolog, no fixed size, ids of its own, colours as CSS variables."""
    target = StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser draws the text, with its fonts
        figure.savefig(target, format="svg", metadata=nothing)
    text = target.getvalue()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', text, count=1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def thumbnail(images: Pictures, sample_id: str, among: int = 1) -> str | None:
    """A sample's picture as a WebP data URI, small enough for `among` of them to keep the page under 3 MB."""
    try:
        picture = images(sample_id)
    except (OSError, ValueError, LookupError):
        return None
    if picture is None:
        return None
    return embedded(to_rgb(picture), _PICTURE_PIXELS, _PICTURE_BUDGET // max(among, MAX_PICTURES // 2))


def embedded(picture: Image.Image, size: int, budget: int = _PICTURE_BUDGET) -> str:
    """A picture as a WebP data URI of at most `size` pixels a side and `budget` bytes before base64."""
    while True:
        small = picture.copy()
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        for quality in (80, 45):
            buffer = BytesIO()
            small.save(buffer, "WEBP", quality=quality, method=2)
            if buffer.tell() <= budget or (size < 64 and quality == 45):
                return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        size = size * 2 // 3
