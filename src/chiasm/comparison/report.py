"""`report.html` of a comparison: the recommendation first, then the numbers it stands on; no script, no network."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from chiasm.comparison import plots, tables
from chiasm.comparison.curves import IMAGES, LARGE, MEASURES, PATCHES, TEXT, Shape, crossings, unknown
from chiasm.comparison.recommend import recommend, ways_of
from chiasm.comparison.timing import incomparable
from chiasm.comparison.ways import Row, by_way, mean_of, score, skills_of
from chiasm.evaluation.page import write_page
from chiasm.evaluation.plots import Pictures, thumbnail

QUESTIONS = 12
"""Questions that are shown with every way's answer."""
TEXTS = (16, 64, 256, 1024, 4096)
TEMPLATE = Path(__file__).parent / "compare.html.j2"


def write_report(
    path: Path,
    results: Sequence[Row],
    answers: Mapping[str, Sequence[Row]],
    info: Mapping[str, Any],
    images: Pictures = lambda sample_id: None,
    attention: Mapping[str, Path] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
    failed: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes the page to `path` and returns it.

    Args:
        results: finished cells.
        answers: name of a cell -> the rows of its evaluation.
        info: `title`, `budget` in words, `facts` (short texts), judged `claims`, `command`, which repeats it all, and
            a `warning` of numbers that mean nothing, or none; perhaps `done`, pairs of what was done and how;
            `unfinished` cells; and `named`, ways with names of regions -> how many.
        images: a test sample's id -> its picture.
        attention: name of a cell -> its attention map.
        skipped: combinations that cannot be, and why.
        failed: cells that stopped, and the last that they said.
    """
    ways, names = by_way(results), skills_of(results)
    named = info.get("named", {})
    advice = recommend(ways_of(results, answers), info["budget"], named)
    looks = _looks(results, attention or {})
    shapes = {way: Shape(**cells[0]["shape"]) for way, cells in ways.items() if cells[0]["shape"]}
    fields = {
        "info": info,
        "advice": advice,
        "adjectives": tables.adjectives(ways, named),
        "done": info.get("done", ()),
        "unfinished": info.get("unfinished", ()),
        "incomparable": incomparable(ways),
        "unknown": unknown(shapes),
        "steps_alone": _knows_steps(ways),
        "planes": [Markup(plot) for plot in _planes(ways) if plot],
        "silent": [way for way, cells in ways.items() if mean_of(cells, "measured", "first_token_seconds") is None],
        "late": [way for way, cells in ways.items() if cells[0]["choice"]["fusion"] == "late"],
        "bars": [(name, Markup(_bars(ways, name))) for name in names],
        "skills": tables.skills(ways, names),
        "learning": [Markup(plot) for plot in _learning(ways) if plot],
        "costs": tables.costs(ways),
        "kept": tables.kept(ways),
        "finding": tables.finding(ways),
        "curves": [Markup(plot) for plot in _curves(ways, shapes) if plot],
        "crossings": tables.crossing_table(crossings(shapes)),
        "looks": looks,
        "unseen": [way for way in ways if way not in {look["way"] for look in looks}],
        "questions": _questions(results, answers, images),
        "skipped": skipped,
        "failed": failed,
    }
    return write_page(path, TEMPLATE, fields, whole=_whole)


def _planes(ways: Mapping[str, Sequence[Row]]) -> list[str | None]:
    """Accuracy against tokens and against time."""
    spent = ("training", "seconds") if _knows_steps(ways) else ("seconds", "train")
    axes: list[tuple[str, str, tuple[str, ...], float]] = [
        ("tokens", "visual tokens of a picture", ("closed_form", "visual_tokens"), 1),
        ("first", "milliseconds to the first token", ("measured", "first_token_seconds"), 1e3),
        ("training", "seconds of training", spent, 1),
    ]
    return [
        plots.pareto(_points(ways, path, scale), label, f"pareto-{name}", logarithmic=True)
        for name, label, path, scale in axes
    ]


def _knows_steps(ways: Mapping[str, Sequence[Row]]) -> bool:
    """Whether the cells tell the time of steps by itself; older ones tell that of whole stages."""
    return all(mean_of(cells, "training", "seconds") is not None for cells in ways.values())


def _points(ways: Mapping[str, Sequence[Row]], path: tuple[str, ...], scale: float) -> list[plots.Point]:
    points = []
    for index, (way, cells) in enumerate(ways.items()):
        x, y = mean_of(cells, *path), score(cells)
        if y is not None:
            points.append(plots.Point(way, 0.0 if x is None else scale * x, y.accuracy, y.low, y.high, index))
    return points


def _bars(ways: Mapping[str, Sequence[Row]], skill: str) -> str:
    found = {way: score(cells, skill) for way, cells in ways.items()}
    rows = [(way, s.accuracy, s.low, s.high, s.control) for way, s in found.items() if s is not None]
    chance = next((s.chance for s in found.values() if s is not None), None)
    return plots.skill_bars(rows, chance, f"skill-{skill}")


def _learning(ways: Mapping[str, Sequence[Row]]) -> list[str | None]:
    """Validation loss over training, of the first seed; and what the right picture is worth. Where a budget gives ways
    different numbers of steps, they are told as shares of it."""
    ends = {way: cells[0]["training"]["steps"] for way, cells in ways.items()}
    shares = len(set(ends.values())) > 1
    curves = {
        way: [(100 * step / ends[way] if shares else step, *losses) for step, *losses in cells[0]["training"]["curve"]]
        for way, cells in ways.items()
    }
    over = "% of the training on questions" if shares else "step"
    loss = {way: [(step, own) for step, own, _ in curve] for way, curve in curves.items()}
    worth = {
        way: [(step, other - own) for step, own, other in curve if other is not None] for way, curve in curves.items()
    }
    return [
        plots.lines(loss, over, "validation loss", "learning-loss"),
        plots.lines(worth, over, "loss another picture adds", "learning-worth"),
    ]


def _curves(ways: Collection[str], shapes: Mapping[str, Shape]) -> list[str | None]:
    """Cost in closed form as patches, pictures and text grow, of those ways that have a shape."""
    patches = next((shape.patches for shape in shapes.values()), PATCHES[0])
    along: dict[str, tuple[str, Sequence[int], Callable[[int], tuple[int, int, int]]]] = {
        "patches": ("patches of a picture", PATCHES, lambda n: (n, 1, TEXT)),
        "images": ("pictures in the prompt", IMAGES, lambda n: (LARGE, n, TEXT)),
        "text": ("text tokens", TEXTS, lambda n: (patches, 1, n)),
    }
    drawn: list[str | None] = []
    for measure, cost in MEASURES.items():
        scale, unit = (2**20, "MiB") if measure == "KV cache" else (10**9, "GFLOP")
        for name, (x, values, prompt) in along.items():
            told = {way: [(n, cost(shape, *prompt(n))) for n in values] for way, shape in shapes.items()}
            series = {way: [(n, at / scale) for n, at in told.get(way, ()) if at is not None] for way in ways}
            plot = f"curve-{measure.replace(' ', '')}-{name}"
            drawn.append(plots.lines(series, x, f"{measure}, {unit}", plot, logarithmic=True))
    return drawn


def _looks(results: Sequence[Row], attention: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Every way's attention map, of its first seed, for one question about one picture."""
    shown = []
    for cells in by_way(results).values():
        path, told = attention.get(cells[0]["name"]), cells[0]["attention"]
        if path is not None and told is not None and path.is_file():
            with Image.open(path) as opened:
                picture = thumbnail(lambda _, image=opened: image, "")  # type: ignore[misc]
            shown.append({"way": cells[0]["way"], "picture": picture, **told})
    return shown


def _questions(results: Sequence[Row], answers: Mapping[str, Sequence[Row]], images: Pictures) -> list[dict[str, Any]]:
    """The same questions, in turns of every skill, with the answer of every way's first seed."""
    firsts = {cells[0]["way"]: answers[cells[0]["name"]] for cells in by_way(results).values()}
    asked = next(iter(firsts.values()))
    by_skill: dict[str, list[Row]] = {}
    for row in asked:
        by_skill.setdefault(row["skill"], []).append(row)
    turns = [row for group in zip(*(rows[:QUESTIONS] for rows in _even(by_skill)), strict=True) for row in group if row]
    given = {way: {row["id"]: row for row in rows} for way, rows in firsts.items()}
    return [
        {
            **{key: row[key] for key in ("skill", "question", "expected")},
            "picture": thumbnail(images, row["sample"], QUESTIONS),
            "answers": [
                (way, rows[row["id"]]["answer"], rows[row["id"]]["correct"])
                for way, rows in given.items()
                if row["id"] in rows
            ],
        }
        for row in turns[:QUESTIONS]
    ]


def _even(by_skill: Mapping[str, Sequence[Row]]) -> list[list[Row | None]]:
    """Lists of one length, filled up with nothing."""
    longest = max(map(len, by_skill.values()), default=0)
    return [[*rows, *[None] * (longest - len(rows))] for rows in by_skill.values()]


def _whole(cell: Any) -> str:
    """A table's text that is broken neither between a number and its unit nor within an interval."""
    kept = re.sub(r"(?<=\d) (?=%|[KMG]?(?:iB|B|FLOP)\b|M\b|ms\b|s\b)", "\u00a0", str(cell))
    return kept.replace("–", "\u2060–\u2060")
