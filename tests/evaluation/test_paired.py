"""Two results on the same questions: the difference, its interval, McNemar's test, and what may be said."""

from dataclasses import replace

import pytest

from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.paired import compare, mcnemar, paired_bootstrap, to_table, verdict


def result(scores: list[float], per_sample: int = 1) -> EvalResult:
    rows = [
        {
            "id": f"q{i}",
            "sample": f"s{i // per_sample}",
            "skill": ("naming", "counting")[i % 2],
            "question": f"question {i}",
            "references": ["yes"],
            "metric": "exact_match",
            "score": score,
            "correct": score >= 0.5,
        }
        for i, score in enumerate(scores)
    ]
    return EvalResult(rows, [])


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(10, 0) == pytest.approx(2 / 2**10)
    assert mcnemar(8, 2) == mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_a_clear_difference_is_said_and_a_small_one_is_not() -> None:
    base = [float(i % 3 == 0) for i in range(120)]
    better = [1.0 if i % 4 == 1 else score for i, score in enumerate(base)]
    total = compare(result(better), result(base))[-1]
    gained = sum(b != a for a, b in zip(base, better, strict=True))
    assert total["difference"] == pytest.approx(gained / 120) and 0 < total["low"] < total["difference"] < total["high"]
    assert (total["only_here"], total["only_there"]) == (gained, 0) and total["p"] < 1e-4
    assert verdict(total, "A", "B").startswith("A is better than B: +")
    assert verdict(compare(result(base), result(better))[-1], "A", "B").startswith("A is worse than B: −")
    one_more = [1.0, *base[1:50], 1.0, *base[51:]]
    assert verdict(compare(result(one_more), result(base))[-1], "A", "B").startswith("No evidence that A and B differ")
    assert "\n" not in verdict(total, "A", "B")
    assert "right only for runs/a-1, " in verdict(total, "runs/a-1", "runs/b-2")


def test_rows_are_per_skill_with_all_at_the_end() -> None:
    rows = compare(result([1.0, 0.0] * 10), result([0.0, 0.0] * 10))
    assert [row["skill"] for row in rows] == ["naming", "counting", "all"]
    assert [row["difference"] for row in rows] == [1.0, 0.0, 0.5]
    assert to_table(rows, "A", "B").row_count == 3


def test_questions_on_one_sample_are_resampled_together() -> None:
    differences = [1.0] * 10 + [-0.5] * 10
    alone = paired_bootstrap(differences, list(range(20)))
    together = paired_bootstrap(differences, [i // 10 for i in range(20)])
    assert together[0] == -0.5 and together[1] == 1.0 and alone[0] > together[0] and alone[1] < together[1]


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="1 only here and 0 only there, such as 'q2'"):
        compare(result([1, 1, 1]), result([1, 1]))
    other = result([1, 1])
    other = replace(other, rows=[{**row, "metric": "anls"} for row in other.rows])
    with pytest.raises(ValueError, match="'q0' has another metric there"):
        compare(result([1, 1]), other)
