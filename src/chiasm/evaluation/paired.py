"""Two checkpoints on the same questions: the paired difference with its interval, McNemar's test, and one verdict.

Questions about one sample are resampled together, so that many of them on one picture do not feign certainty.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.format import percent
from chiasm.evaluation.skills import ALL, Row

RESAMPLES = 4000
LEVEL = 0.05


def compare(result: EvalResult, other: EvalResult, seed: int = 0) -> list[Row]:
    """One row per skill, then one for all: `skill, n, accuracy, other_accuracy, difference, low, high, only_here,
    only_there, p`. The difference is this result's mean score less the other's.

    Raises:
        ValueError: the two did not answer the same questions under the same metrics.
    """
    pairs = _pairs(result.rows, other.rows)
    by_skill: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
    for pair in pairs:
        by_skill[pair[0]["skill"]].append(pair)
    rows = [_compared(skill, group, seed) for skill, group in by_skill.items() if skill != ALL]
    return [*rows, _compared(ALL, pairs, seed)]


def mcnemar(only_here: int, only_there: int) -> float:
    """Two-sided exact p-value: how often so lopsided a split, or a worse one, falls by chance (McNemar 1947,
    https://doi.org/10.1007/BF02295996)."""
    n, fewer = only_here + only_there, min(only_here, only_there)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(
    differences: Sequence[float], groups: Sequence[Any], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean difference, over resampled groups of questions."""
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    places = np.asarray([names[name] for name in groups])
    sums = np.bincount(places, weights=np.asarray(differences, dtype=np.float64), minlength=len(names))
    counts = np.bincount(places, minlength=len(names))
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(names), len(names))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def verdict(total: Row, name: str, other: str) -> str:
    """One line that says no more than the interval and the test do."""
    keys = ("difference", "low", "high")
    difference, low, high = (f"{100 * total[key]:+.1f}".replace("-", "−") for key in keys)
    measured = (
        f"{difference} points (95 % interval {low} to {high}) on {total['n']} questions; "
        f"{total['only_here']} right only for {name}, {total['only_there']} only for {other}, "
        f"McNemar p = {total['p']:.2g}"
    )
    certain = total["p"] < LEVEL or not total["binary"]
    if certain and total["low"] > 0:
        return f"{name} is better than {other}: {measured}."
    if certain and total["high"] < 0:
        return f"{name} is worse than {other}: {measured}."
    return f"No evidence that {name} and {other} differ: {measured}."


def to_table(rows: Sequence[Row], name: str, other: str) -> Table:
    """The comparison as a rich table for the terminal."""
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(("skill", "n", name, other, "difference", "95 % interval", "only here/there", "p")):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(
            row["skill"],
            str(row["n"]),
            percent(row["accuracy"]),
            percent(row["other_accuracy"]),
            f"{100 * row['difference']:+.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            f"{row['only_here']}/{row['only_there']}",
            f"{row['p']:.2g}",
            style="bold" if row["skill"] == ALL else None,
        )
    return table


def _pairs(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, Row]]:
    by_id = {row["id"]: row for row in others}
    missing = [row["id"] for row in rows if row["id"] not in by_id]
    extra = by_id.keys() - {row["id"] for row in rows}
    if missing or extra:
        raise ValueError(
            f"the two did not answer the same questions: {len(missing)} only here and {len(extra)} only there, such as "
            f"{next(iter(missing or extra))!r}; evaluate both on the same data"
        )
    pairs = [(row, by_id[row["id"]]) for row in rows]
    for row, there in pairs:
        for key in ("question", "references", "metric"):
            if row[key] != there[key]:
                raise ValueError(
                    f"question {row['id']!r} has another {key} there ({there[key]!r}) than here ({row[key]!r}); "
                    "evaluate both on the same data with the same --metric"
                )
    return pairs


def _compared(skill: str, pairs: Sequence[tuple[Row, Row]], seed: int) -> Row:
    differences = [row["score"] - there["score"] for row, there in pairs]
    low, high = paired_bootstrap(differences, [row["sample"] for row, _ in pairs], seed)
    only_here = sum(row["correct"] and not there["correct"] for row, there in pairs)
    only_there = sum(there["correct"] and not row["correct"] for row, there in pairs)
    return {
        "skill": skill,
        "n": len(pairs),
        "accuracy": fmean(row["score"] for row, _ in pairs),
        "other_accuracy": fmean(there["score"] for _, there in pairs),
        "difference": fmean(differences),
        "low": low,
        "high": high,
        "only_here": only_here,
        "only_there": only_there,
        "p": mcnemar(only_here, only_there),
        "binary": all(score in (0, 1) for pair in pairs for score in (pair[0]["score"], pair[1]["score"])),
    }
