"""Differences between ways on the same questions: answers of all seeds are averaged per question, and intervals come
from resampling pictures and seeds together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean

import numpy as np

from chiasm.evaluation.skills import wilson

RESAMPLES = 4000
AT_ONCE = 250
LEVEL = 0.05
FEW = 20
"""With fewer pictures resampling knows too little of what could have been, and a closed form widens the interval."""
Scores = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Way:
    """One way of connecting, over its seeds.

    Args:
        scores: seed -> question's id -> score.
        groups: question's id -> the sample that it is about.
        controls: as `scores`, beside another sample's picture; empty without a control.
        cost: what it costs, smaller is better: by that, ways that answer alike are told apart.
        cost_words: the same for people.
        skills: question's id -> its skill.
        perplexity: name of a text -> perplexity after training and before.
    """

    name: str
    scores: Scores
    groups: Mapping[str, str]
    controls: Scores = field(default_factory=dict)
    cost: float = 0.0
    cost_words: str = ""
    skills: Mapping[str, str] = field(default_factory=dict)
    perplexity: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return fmean(fmean(answers.values()) for answers in self.scores.values())

    def without(self, skill: str) -> "Way":
        """The way without the questions of a skill."""

        def kept(answers: Mapping[str, float]) -> dict[str, float]:
            return {question: score for question, score in answers.items() if self.skills.get(question) != skill}

        scores, controls = ({seed: kept(one) for seed, one in every.items()} for every in (self.scores, self.controls))
        groups = {question: group for question, group in self.groups.items() if self.skills.get(question) != skill}
        return replace(self, scores=scores, controls=controls, groups=groups)

    @property
    def control(self) -> float | None:
        found = [score for answers in self.controls.values() for score in answers.values()]
        return fmean(found) if found else None


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


class _Sides:
    """Scores of several ways on the same questions, summed by picture and seed, and the means of resampled ones."""

    def __init__(self, scores: Sequence[Scores], questions: Sequence[str], groups: Mapping[str, str]) -> None:
        places = {name: place for place, name in enumerate(dict.fromkeys(groups[q] for q in questions))}
        group, self.pictures = np.asarray([places[groups[q]] for q in questions]), len(places)
        self.counts = np.bincount(group, minlength=self.pictures)
        self.sums = [
            np.stack([np.bincount(group, [a[q] for q in questions], self.pictures) for a in one.values()])
            for one in scores
        ]
        self.means = np.asarray([side.mean(0).sum() for side in self.sums]) / len(questions)

    def resampled(self, seed: int) -> np.ndarray:
        """Means `(RESAMPLES, sides)` of pictures that are drawn for all alike, and of seeds of each."""
        draw, found = np.random.default_rng(seed), []
        for _ in range(0, RESAMPLES, AT_ONCE):
            drawn = draw.multinomial(self.pictures, np.full(self.pictures, 1 / self.pictures), AT_ONCE)
            means = []
            for side in self.sums:
                seeds = draw.multinomial(len(side), np.full(len(side), 1 / len(side)), AT_ONCE) / len(side)
                means.append((seeds * (drawn @ side.T)).sum(1))
            found.append(np.stack(means, 1) / (drawn @ self.counts)[:, None])
        return np.concatenate(found)

    def widened(self, found: Difference, one: int, other: int, spread: float, level: float) -> Difference:
        """The interval, together with the one in closed form where resampling tells too little."""
        if spread > 1e-12 and self.pictures >= FEW:
            return found
        here, there = (self.sums[index].mean(0) / self.counts for index in (one, other))
        low, high = newcombe(here, there, 1 - level)
        return Difference(found.mean, min(found.low, low), max(found.high, high))


def newcombe(one: np.ndarray, other: np.ndarray, confidence: float) -> tuple[float, float]:
    """Interval of a difference of paired proportions, sound at 0 and 1 too (Newcombe 1998, method 10,
    https://pubmed.ncbi.nlm.nih.gov/9839354): two Wilson intervals, put together by how alike the answers are."""
    number, (p, q) = len(one), (float(one.mean()), float(other.mean()))
    (below, above), (under, over) = (wilson(min(mean * number, number), number, confidence) for mean in (p, q))
    scale = math.sqrt(p * (1 - p) * q * (1 - q))
    alike = 0.0
    if scale > 0:
        alike = (float((one * other).mean()) - p * q) / scale
        alike = max(0.0, alike - 1 / (2 * number * scale)) if alike > 0 else alike
    reach = [
        math.sqrt(max(0.0, a * a + b * b - 2 * alike * a * b))
        for a, b in ((p - below, over - q), (above - p, q - under))
    ]
    return max(-1.0, p - q - reach[0]), min(1.0, p - q + reach[1])


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
    sides = _Sides([one.scores, other.scores], questions, one.groups)
    means, level = sides.resampled(seed), LEVEL / max(1, comparisons)
    apart = means[:, 0] - means[:, 1]
    low, high = np.quantile(apart, [level / 2, 1 - level / 2])
    found = Difference(float(sides.means[0] - sides.means[1]), float(low), float(high))
    return sides.widened(found, 0, 1, float(apart.std()), level)


def beyond_control(
    way: Way, comparisons: int = 1, seed: int = 0, among: Callable[[str], bool] = lambda question: True
) -> Difference | None:
    """How much better a way answers about the right picture than about another; the same seeds answer both. None
    without a control."""
    if not way.controls:
        return None
    asked = set.intersection(*(set(answers) for answers in way.controls.values()))
    questions = [question for question in way.groups if question in asked and among(question)]
    if not questions:
        return None
    gained = {s: {q: way.scores[s][q] - controls[q] for q in questions} for s, controls in way.controls.items()}
    drawn = _Sides([gained], questions, way.groups)
    means, level = drawn.resampled(seed)[:, 0], LEVEL / max(1, comparisons)
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    sides = _Sides([way.scores, way.controls], questions, way.groups)
    found = Difference(float(drawn.means[0]), float(low), float(high))
    return sides.widened(found, 0, 1, float(means.std()), level)


def from_best(best: Way, ways: Sequence[Way], seed: int = 0) -> dict[str, Difference]:
    """How much better the best way answers than every other one, by name.

    The same answers that are compared have picked the best, so the intervals are wide enough for all pairs of ways at
    once: they hold the largest error of any pair, in units of its own spread, in all but `LEVEL` of the resamples.
    """
    others = [way for way in ways if way is not best]
    if not others:
        return {}
    everyone = [best, *others]
    questions = [question for question in best.groups if all(question in way.groups for way in others)]
    sides = _Sides([way.scores for way in everyone], questions, best.groups)
    errors = sides.resampled(seed) - sides.means
    pairs = list(combinations(range(len(everyone)), 2))
    worst = np.zeros(len(errors))
    for one, other in pairs:
        apart = errors[:, one] - errors[:, other]
        if (spread := apart.std()) > 1e-12:
            worst = np.maximum(worst, np.abs(apart) / spread)
    reach, found = float(np.quantile(worst, 1 - LEVEL)), {}
    for index, way in enumerate(others, 1):
        mean, spread = float(sides.means[0] - sides.means[index]), float((errors[:, 0] - errors[:, index]).std())
        interval = Difference(mean, mean - reach * spread, mean + reach * spread)
        found[way.name] = sides.widened(interval, 0, index, spread, LEVEL / len(pairs))
    return found
