"""What the cells of one way of connecting say together: means over seeds, and intervals that know of them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from chiasm.evaluation.skills import ALL, summarise

Row = Mapping[str, Any]
FEW_SHOT = "few-shot"
"""The skill of questions that were asked once more behind solved examples."""
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t of a 95 % interval, for two seeds and more."""


@dataclass(frozen=True)
class Score:
    """Accuracy of a way in one skill."""

    accuracy: float
    low: float
    high: float
    control: float | None
    chance: float | None
    n: int


def by_way(results: Iterable[Row]) -> dict[str, list[Row]]:
    """Results that differ only in their seed, by the name of the way."""
    ways: dict[str, list[Row]] = defaultdict(list)
    for result in results:
        ways[result["way"]].append(result)
    return dict(ways)


def without_few_shot(result: Row, rows: Sequence[Row]) -> Row:
    """A result whose summary of everything leaves out what was asked behind solved examples; older ones count it.

    Args:
        rows: of the cell's evaluation.
    """
    summary, asked = result["summary"], [dict(row) for row in rows if row["skill"] != FEW_SHOT]
    if summary[-1]["n"] == len(asked):
        return result
    skills = [row for row in summary if row["skill"] not in (FEW_SHOT, ALL)]
    whole = skills.pop() if len(skills) == 1 else summarise(asked)[-1]
    return {**result, "summary": [*skills, *(row for row in summary if row["skill"] == FEW_SHOT), whole]}


def skills_of(results: Sequence[Row]) -> list[str]:
    """All skills in the order of the test; `all` comes last, and alone where there is one skill only."""
    named = list(dict.fromkeys(row["skill"] for result in results for row in result["summary"]))
    return [skill for skill in named if skill != ALL] + [ALL] * (ALL in named)


def score(cells: Sequence[Row], skill: str | None = None) -> Score | None:
    """A skill over all seeds, or everything; None where it was not asked about."""
    rows = [row for cell in cells for row in cell["summary"] if row["skill"] == (skill or cell["summary"][-1]["skill"])]
    if not rows:
        return None
    accuracy = fmean(row["accuracy"] for row in rows)
    low, high = interval([row["accuracy"] for row in rows], [(row["low"], row["high"]) for row in rows])
    controls = [row["control_accuracy"] for row in rows if row["control_accuracy"] is not None]
    return Score(accuracy, low, high, fmean(controls) if controls else None, rows[0]["chance"], rows[0]["n"])


def interval(
    means: Sequence[float], intervals: Sequence[tuple[float, float]], bounded: bool = True
) -> tuple[float, float]:
    """95 % interval of a mean over seeds that answered the same questions: the doubt of the questions, which more seeds
    do not lessen, and that of the seeds, put together as independent. `bounded`: within 0 and 1."""
    centre = fmean(means)
    below = fmean(mean - low for mean, (low, _) in zip(means, intervals, strict=True))
    above = fmean(high - mean for mean, (_, high) in zip(means, intervals, strict=True))
    if len(means) > 1:
        spread = T95[min(len(means) - 2, len(T95) - 1)] * stdev(means) / math.sqrt(len(means))
        below, above = math.hypot(below, spread), math.hypot(above, spread)
    low, high = centre - below, centre + above
    return (max(0.0, low), min(1.0, high)) if bounded else (low, high)


def mean_of(cells: Sequence[Row], *path: str) -> float | None:
    """The mean over seeds of a number at a path of keys; None where no cell has it."""
    found = []
    for cell in cells:
        value: Any = cell
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found.append(float(value))
    return fmean(found) if found else None
