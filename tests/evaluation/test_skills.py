"""Intervals against published values, summaries by hand, tables that survive any skill name."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from chiasm.evaluation.skills import bootstrap, chance, interval, summarise, to_table, wilson


def row(skill: str, expected: str, score: float, control: float | None = None, metric: str = "exact_match", **more):
    own = {"skill": skill, "metric": metric, "expected": expected, "references": [expected], "score": score}
    return own | {"contains": score, "control_score": control} | more


def test_wilson_equals_published_values() -> None:
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_refuses_more_successes_than_questions() -> None:
    with pytest.raises(ValueError, match="successes is 3, expected 0 to n = 2"):
        wilson(3, 2)


@given(n=st.integers(1, 500), data=st.data())
def test_wilson_holds_the_proportion_and_narrows(n: int, data) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1
    wider_low, wider_high = wilson(successes, n, confidence=0.99)
    assert wider_high - wider_low > high - low
    four_low, four_high = wilson(4 * successes, 4 * n)
    assert four_high - four_low < high - low


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    scores = [i / 99 for i in range(100)]
    assert bootstrap(scores, seed=1) == bootstrap(scores, seed=1) != bootstrap(scores, seed=2)
    low, high = bootstrap(scores, seed=0)
    half = 1.96 * 0.2916 / 10  # standard deviation of 0, 1/99, ..., 1
    assert low == pytest.approx(0.5 - half, abs=0.01)
    assert high == pytest.approx(0.5 + half, abs=0.01)
    with pytest.raises(ValueError, match="empty"):
        bootstrap([])


def test_interval_is_wilson_for_right_and_wrong_only() -> None:
    assert interval([1.0, 0.0, 1.0]) == wilson(2, 3)
    assert interval([0.9, 0.0, 1.0], seed=3) == bootstrap([0.9, 0.0, 1.0], seed=3)


def test_summary_by_hand() -> None:
    rows = [row("colour", "red", 1.0, 0.0), row("colour", "red", 1.0, 1.0), row("colour", "blue", 0.0, 0.0)]
    rows += [row("count", "3", 1.0, 0.0)]
    colour, count, everything = summarise(rows)
    assert [colour["skill"], count["skill"], everything["skill"]] == ["colour", "count", "all"]
    assert colour["n"] == 3 and colour["accuracy"] == pytest.approx(2 / 3)
    assert (colour["low"], colour["high"]) == wilson(2, 3)
    assert colour["control_accuracy"] == pytest.approx(1 / 3)
    assert (colour["control_low"], colour["control_high"]) == wilson(1, 3)
    assert colour["gain"] == pytest.approx(1 / 3)
    assert colour["gain_low"] < 0 < colour["gain_high"]
    assert colour["chance"] == pytest.approx(2 / 3)
    assert everything["chance"] == pytest.approx((2 + 1) / 4)
    assert everything["accuracy"] == pytest.approx(3 / 4)
    assert json.loads(json.dumps([colour, count, everything], allow_nan=False)) == [colour, count, everything]


def test_gain_equals_newcombe() -> None:
    # Newcombe 1998 (two proportions), case (a): 56/70 - 48/80 = 0.2, method 10: 0.0524 to 0.3339
    own, other = wilson(56, 70), wilson(48, 80)
    low = 0.2 - ((0.8 - own[0]) ** 2 + (other[1] - 0.6) ** 2) ** 0.5
    assert low == pytest.approx(0.0524, abs=5e-5)
    rows = [row("s", "x", float(i < 8), float(i < 6)) for i in range(10)]
    (summary,) = summarise(rows)
    own, other = wilson(8, 10), wilson(6, 10)
    assert summary["gain_low"] == pytest.approx(0.2 - ((0.8 - own[0]) ** 2 + (other[1] - 0.6) ** 2) ** 0.5)
    assert summary["gain_high"] == pytest.approx(0.2 + ((own[1] - 0.8) ** 2 + (0.6 - other[0]) ** 2) ** 0.5)


def test_perfect_answers_on_few_questions_leave_doubt() -> None:
    (summary,) = summarise([row("s", "x", 1.0, 0.0)] * 3)
    assert summary["gain"] == 1.0 and summary["gain_low"] < 0.5


def test_no_control_is_none_not_zero() -> None:
    (summary,) = summarise([row("all", "x", 1.0)])
    assert summary["control_n"] == 0
    assert [summary[key] for key in ("control_accuracy", "control_low", "control_high", "gain", "gain_low")] == [
        None
    ] * 5


def test_one_skill_has_one_row_and_no_rows_have_none() -> None:
    assert [s["skill"] for s in summarise([row("count", "3", 1.0)])] == ["count"]
    assert [s["skill"] for s in summarise([row("all", "3", 1.0)])] == ["all"]
    assert [s["skill"] for s in summarise([row("count", "3", 1.0), row("all", "3", 0.0)])] == ["count", "all"]
    assert summarise([]) == []


def test_captions_have_f1_and_anls_and_no_chance() -> None:
    rows = [row("caption", "a b", s, metric="token_f1", token_f1=s, anls=s / 2) for s in (0.2, 0.4, 0.9)]
    (summary,) = summarise(rows)
    assert summary["metric"] == "token_f1" and summary["chance"] is None
    assert summary["token_f1"] == summary["accuracy"] == pytest.approx(0.5)
    assert summary["anls"] == pytest.approx(0.25)
    assert summary["anls_low"] < 0.25 < summary["anls_high"]


def test_chance_knows_that_spellings_are_one_answer() -> None:
    assert chance([row("s", "Red", 0.0), row("s", "red.", 0.0), row("s", "blue", 0.0)]) == pytest.approx(2 / 3)


def test_the_table_survives_hostile_names() -> None:
    summary = summarise([row("a|b\n[bold]", "x", 1.0, 0.0), row("색", "x", 0.0)])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(to_table(summary, title="Test"))
    text = console.export_text()
    assert "[bold]" in text and "색" in text and "50.0 %" in text
