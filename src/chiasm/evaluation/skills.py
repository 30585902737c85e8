"""Accuracy per skill with 95 % intervals, beside the shuffled-image control and the best blind constant answer.

The control asks every question with another sample's picture. A model that sees beats it; the gain's interval says
by how much. Chance is the score of always giving the skill's most rewarding answer.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from chiasm.evaluation.format import percent, percent_range
from chiasm.evaluation.metrics import METRICS

Row = dict[str, Any]
ALL = "all"
_CAPTION_METRICS = ("token_f1", "anls")
_CONSTANTS_TRIED = 20


def wilson(successes: int | float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion, sound at 0 % and 100 % too (Wilson 1927,
    https://doi.org/10.1080/01621459.1927.10502953)."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}, expected 0 to n = {n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap(
    scores: Sequence[float], seed: int = 0, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the mean of `scores` (Efron 1979, https://doi.org/10.1214/aos/1176344552), by seed."""
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("scores is empty: nothing to resample")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, values.size, values.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean: Wilson when every score is 0 or 1, percentile bootstrap otherwise."""
    if all(score in (0, 1) for score in scores):
        return wilson(sum(scores), len(scores))
    return bootstrap(scores, seed)


def summarise(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """One row per skill in the order of first appearance, then the row "all" over everything.

    `rows` are those of `evaluate`. Each summary row has `skill, metric, n, accuracy, low, high, contains, chance`,
    `control_n, control_accuracy, control_low, control_high, gain, gain_low, gain_high` (None without a control; the
    gain is over the questions that have one) and, for captions, `token_f1` and `anls` with their intervals. Questions
    are taken as independent: several on one picture make the intervals a little too narrow.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["skill"], []).append(row)
    total = groups.pop(ALL, None)
    skills = [_summarise_skill(skill, group, seed) for skill, group in groups.items()]
    if rows and (len(skills) != 1 or total):
        skills.append(_summarise_skill(ALL, rows, seed))
    return skills


def _summarise_skill(skill: str, rows: Sequence[Row], seed: int) -> Row:
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    summary: Row = {"skill": skill, "metric": metrics[0] if len(metrics) == 1 else "mixed", "n": len(rows)}
    summary |= _mean("accuracy", "", [row["score"] for row in rows], seed)
    summary |= {"contains": fmean(row["contains"] for row in rows), "chance": chance(rows)}
    controlled = [row for row in rows if row.get("control_score") is not None]
    summary |= {"control_n": len(controlled)}
    summary |= _mean("control_accuracy", "control_", [row["control_score"] for row in controlled], seed)
    summary |= _gain(controlled, seed)
    if all("anls" in row for row in rows):
        for metric in _CAPTION_METRICS:
            summary |= _mean(metric, f"{metric}_", [row[metric] for row in rows], seed)
    return summary


def _mean(name: str, prefix: str, scores: Sequence[float], seed: int) -> Row:
    """The mean as `name` and its interval as `prefix`low and `prefix`high; None three times without scores."""
    low, high = interval(scores, seed) if scores else (None, None)
    return {name: fmean(scores) if scores else None, f"{prefix}low": low, f"{prefix}high": high}


def _gain(rows: Sequence[Row], seed: int) -> Row:
    """What the right picture adds over the wrong one, by Newcombe's square-and-add interval (1998, method 10,
    https://pubmed.ncbi.nlm.nih.gov/9595617), which keeps its doubt at 0 and 1 and ignores the pairing (so is wide)."""
    if not rows:
        return {"gain": None, "gain_low": None, "gain_high": None}
    own, control = [row["score"] for row in rows], [row["control_score"] for row in rows]
    gain = fmean(own) - fmean(control)
    (low, high), (control_low, control_high) = interval(own, seed), interval(control, seed)
    below = math.hypot(fmean(own) - low, control_high - fmean(control))
    above = math.hypot(high - fmean(own), fmean(control) - control_low)
    return {"gain": gain, "gain_low": max(-1.0, gain - below), "gain_high": min(1.0, gain + above)}


def chance(rows: Sequence[Row]) -> float | None:
    """The best that one constant answer scores within a skill; over several skills, the mean with one answer for each.
    None where captions are among the rows: no constant sentence means anything."""
    by_skill: dict[str, list[Row]] = {}
    for row in rows:
        by_skill.setdefault(row["skill"], []).append(row)
    bests = [_best_constant(group) for group in by_skill.values()]
    known = [best for best in bests if best is not None]
    return sum(known) / len(rows) if len(known) == len(bests) and rows else None


def _best_constant(rows: Sequence[Row]) -> float | None:
    """The highest sum of scores of one answer, tried over the expected answers that occur most."""
    if any(row["metric"] in _CAPTION_METRICS for row in rows):
        return None
    candidates = Counter(row["expected"] for row in rows).most_common(_CONSTANTS_TRIED)
    scorers: list[tuple[Callable[..., float], list[str]]] = [
        (METRICS[row["metric"]], row["references"]) for row in rows
    ]
    return max(sum(score(answer, references) for score, references in scorers) for answer, _ in candidates)


COLUMNS = ("skill", "n", "accuracy", "95 % interval", "other picture", "95 % interval", "chance")


def cells(row: Row) -> tuple[str, ...]:
    """A summary row as the texts of `COLUMNS`."""
    own = percent(row["accuracy"]), percent_range(row["low"], row["high"])
    control = percent(row["control_accuracy"]), percent_range(row["control_low"], row["control_high"])
    return row["skill"], str(row["n"]), *own, *control, percent(row["chance"])


def caption_lines(summary: Sequence[Row]) -> list[str]:
    """For every skill that is captions a line with CIDEr, its interval, and BLEU."""
    return [
        f"{row['skill']}: CIDEr {row['cider']:.2f} ({row['cider_low']:.2f}–{row['cider_high']:.2f}), "
        f"BLEU-4 {row['bleu']:.1f}"
        for row in summary
        if "cider" in row
    ]


def to_table(summary: Sequence[Row], title: str | None = None) -> Table:
    """The summary as a rich table for the terminal."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    for row in summary:
        table.add_row(*(Text(text) for text in cells(row)), style="bold" if row["skill"] == ALL else None)
    return table
