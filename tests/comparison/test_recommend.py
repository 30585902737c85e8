"""The recommendation on made-up answers: a clear winner, a cheaper equal, a model that does not look, luck of seeds."""

from collections.abc import Sequence
from random import Random

import pytest

from chiasm.comparison.recommend import Way, difference, recommend


def way(
    name: str, accuracy: float, cost: float, control: float = 0.1, seeds: Sequence[int] = (0,), n: int = 400
) -> Way:
    scores = {}
    for seed in seeds:
        dice = Random(f"{name} {seed}")
        scores[seed] = {str(q): float(dice.random() < accuracy) for q in range(n)}
    return Way(name, scores, {str(q): f"picture {q}" for q in range(n)}, control, cost, f"{cost} FLOP")


def test_a_clear_winner_is_named_with_its_reasons() -> None:
    told = recommend([way("good", 0.9, 5), way("bad", 0.3, 1)], "1,000 samples")
    assert (told.way, told.alike, told.worse) == ("good", [], ["bad"])
    assert told.sentences[0].startswith("Take good for this data and 1,000 samples: ")
    assert "measurably better than every other way" in " ".join(told.sentences)
    assert "one seed only" in told.sentences[-1]


def test_of_equals_the_cheapest_is_taken_and_said_to_be_equal() -> None:
    told = recommend([way("dear", 0.72, 9), way("cheap", 0.70, 1), way("bad", 0.2, 1)], "x")
    assert told.way == "cheap"
    assert told.worse == ["bad"]
    assert any("no measurable difference" in sentence.lower() for sentence in told.sentences)


def test_nothing_is_recommended_where_nothing_looks() -> None:
    told = recommend([way("one", 0.3, 1, control=0.3), way("other", 0.28, 1, control=0.29)], "12 samples")
    assert told.way is None
    assert told.sentences[0].startswith("No way can be recommended")
    assert "12 samples is too little here" in told.sentences[0]


def test_more_comparisons_and_more_luck_make_wider_intervals() -> None:
    one, other = way("one", 0.6, 1), way("other", 0.5, 1)
    single, many = difference(one, other), difference(one, other, comparisons=10)
    assert many.low < single.low < single.mean < single.high < many.high
    lucky = Way("lucky", {0: dict.fromkeys(one.groups, 1.0), 1: dict.fromkeys(one.groups, 0.0)}, one.groups, 0.1, 1, "")
    assert difference(lucky, other).high - difference(lucky, other).low > 5 * (single.high - single.low)
    assert single.mean == pytest.approx(one.accuracy - other.accuracy)
