"""A recommendation in words: which way of connecting to take here, why, and what the numbers do not tell.

Ways are compared on the same questions. Answers of all seeds are averaged per question, and the difference of two ways
gets an interval by resampling pictures and seeds together, wide enough for as many comparisons as are made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from chiasm.comparison.ways import by_way
from chiasm.evaluation.format import operations, percent

Row = Mapping[str, Any]
RESAMPLES = 4000
LEVEL = 0.05


@dataclass(frozen=True)
class Way:
    """One way of connecting, over its seeds.

    Args:
        scores: seed -> question's id -> score.
        groups: question's id -> the sample that it is about.
        control: mean score beside another sample's picture; None without a control.
        cost: what it costs, smaller is better: by that, ways that answer alike are told apart.
        cost_words: the same for people.
    """

    name: str
    scores: Mapping[int, Mapping[str, float]]
    groups: Mapping[str, str]
    control: float | None = None
    cost: float = 0.0
    cost_words: str = ""

    @property
    def accuracy(self) -> float:
        return fmean(fmean(answers.values()) for answers in self.scores.values())


@dataclass(frozen=True)
class Difference:
    """How much better one way answers than another: the mean and an interval."""

    mean: float
    low: float
    high: float

    @property
    def measurable(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def words(self) -> str:
        low, high = (f"{100 * value:+.1f}" for value in (self.low, self.high))
        return f"{100 * self.mean:+.1f} points ({low} to {high})".replace("-", "−")


@dataclass(frozen=True)
class Recommendation:
    """`way` is None where the numbers allow none. `alike`: ways without a measurable difference from the best."""

    way: str | None
    best: str
    alike: list[str]
    worse: list[str]
    sentences: list[str]


def ways_of(results: Sequence[Row], answers: Mapping[str, Sequence[Row]]) -> list[Way]:
    """Cells that differ only in their seed, put together.

    Args:
        answers: name of a cell -> the rows of its evaluation.
    """
    made = []
    for name, group in by_way(results).items():
        rows = {result["choice"]["seed"]: answers[result["name"]] for result in group}
        scores = {seed: {row["id"]: float(row["score"]) for row in asked} for seed, asked in rows.items()}
        controls = [
            row["control_score"] for asked in rows.values() for row in asked if row["control_score"] is not None
        ]
        cost, words = _cost(group[0])
        groups = {row["id"]: row["sample"] for row in next(iter(rows.values()))}
        made.append(Way(name, scores, groups, fmean(controls) if controls else None, cost, words))
    return made


def _cost(result: Row) -> tuple[float, str]:
    """KV-cache bytes and prefill FLOPs of a picture decide; what has no cache of its own costs its vector alone."""
    closed = result["closed_form"]
    kept = closed.get("kv_cache_bytes_per_image")
    if kept is None:
        return 0.0, "no place in a language model's context"
    flops = closed["connect_flops"] + closed["prefill_flops"]
    return float(flops), f"{operations(flops)} to the first token and {kept / 1024:,.0f} KiB of KV cache a picture"


def difference(
    one: Way, other: Way, comparisons: int = 1, seed: int = 0, among: Callable[[str], bool] = lambda question: True
) -> Difference:
    """How much better `one` answers; questions about one picture are resampled together, and seeds with them.

    Args:
        comparisons: that are made at once; more of them make wider intervals.
        among: whether a question, by its id, counts.

    Raises:
        ValueError: no question counts.
    """
    questions = [question for question in one.groups if question in other.groups and among(question)]
    if not questions:
        raise ValueError(f"{one.name} and {other.name} have no question in common that counts")
    places = {name: place for place, name in enumerate(dict.fromkeys(one.groups[q] for q in questions))}
    group = np.asarray([places[one.groups[q]] for q in questions])
    counts = np.bincount(group, minlength=len(places))
    sums = [
        np.stack([np.bincount(group, [answers[q] for q in questions], len(places)) for answers in way.scores.values()])
        for way in (one, other)
    ]
    draw = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        pictures = draw.integers(0, len(places), len(places))
        here, there = (side[draw.integers(0, len(side), len(side))].mean(0)[pictures].sum() for side in sums)
        means[index] = (here - there) / counts[pictures].sum()
    tail = LEVEL / (2 * max(1, comparisons))
    low, high = np.quantile(means, [tail, 1 - tail])
    here, there = (side.mean(0).sum() for side in sums)
    return Difference(float(here - there) / len(questions), float(low), float(high))


def recommend(ways: Sequence[Way], budget: str) -> Recommendation:
    """What to take of ways that were asked the same questions.

    Args:
        budget: the budget in words.
    """
    best = max(ways, key=lambda way: (way.accuracy, -way.cost))
    others = [way for way in ways if way is not best]
    found = {way.name: difference(best, way, len(others)) for way in others}
    alike = [way for way in others if not found[way.name].measurable]
    worse = sorted((way for way in others if found[way.name].measurable), key=lambda way: -way.accuracy)
    said: list[str] = []
    names = [way.name for way in alike], [way.name for way in worse]
    blind = best.control is not None and best.accuracy - best.control <= _doubt(best)
    if blind:
        said.append(
            f"No way can be recommended: the best one, {best.name}, is right in {percent(best.accuracy)} of the "
            f"answers and in {percent(best.control)} with another sample's picture, which is no measurable difference. "
            f"Nothing shows that it looks; {budget} is too little here."
        )
        return Recommendation(None, best.name, *names, said + _doubts(ways))
    chosen = min([best, *alike], key=lambda way: (way.cost, -way.accuracy))
    said.append(
        f"Take {chosen.name} for this data and {budget}: {percent(chosen.accuracy)} right, {chosen.cost_words}."
    )
    if chosen is not best:
        said.append(
            f"{best.name} has the highest score, {percent(best.accuracy)}, but there is no measurable difference "
            f"between the two here ({found[chosen.name].words}), and {chosen.name} is cheaper."
        )
    rest = [way for way in alike if way is not chosen]
    if rest:
        listed = _listed([way.name for way in rest])
        said.append(f"No measurable difference between {best.name} and {listed} here; {chosen.name} costs the least.")
    elif not alike and others:
        said.append("It is measurably better than every other way.")
    if worse:
        told = "; ".join(f"{way.name} by {found[way.name].words}" for way in worse)
        said.append(f"{best.name} beats these measurably: {told}.")
    return Recommendation(chosen.name, best.name, *names, said + _doubts(ways))


def _doubt(way: Way) -> float:
    """Half a 95 % interval of the difference from the control, as if every picture were one question."""
    pictures = max(1, len(set(way.groups.values())))
    spread = way.accuracy * (1 - way.accuracy) + (way.control or 0) * (1 - (way.control or 0))
    return 1.96 * float(np.sqrt(spread / pictures))


def _doubts(ways: Sequence[Way]) -> list[str]:
    """What the reader must not take from the numbers."""
    seeds, pictures = min(len(way.scores) for way in ways), len(set(ways[0].groups.values()))
    said = [
        f"Intervals come from {pictures} pictures, resampled, and are widened for the number of comparisons "
        f"({len(ways) - 1})."
    ]
    if seeds == 1:
        said.append(
            "Every way was trained with one seed only: how much luck there is in a training run is not in the "
            "intervals. More seeds tell."
        )
    else:
        said.append(f"At least {seeds} seeds of every way are resampled with the pictures.")
    return said


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
