"""Verdicts on claims, on made-up cells; the plans of claims that ship name cells that they have."""

from pathlib import Path
from typing import Any

import pytest
from test_report import answers, result

from chiasm.comparison.choices import expand
from chiasm.comparison.claims import AGAINST, BLIND, EQUAL, ONCE, OPEN, SUPPORTED, judge, to_markdown
from chiasm.comparison.plan import load_plan
from chiasm.comparison.schema import Claim

PLANS = sorted((Path(__file__).parents[2] / "recipes/claims").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_claims_that_ship_name_cells_of_their_plans(path: Path) -> None:
    plan = load_plan(path)
    choices, _ = expand(plan, lambda: (4, 4))
    ways = {choice.way for choice in choices}
    assert {name for claim in plan.claims for name in claim.ways} <= ways
    assert load_plan(f"claims/{path.stem}") == plan


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ({"better": "mlp-early", "than": "qformer-early"}, SUPPORTED),
        ({"better": "qformer-early", "than": "mlp-early"}, AGAINST),
        ({"better": "mlp-early", "than": "linear-early"}, EQUAL),
        ({"better": "mlp-early", "than": "qformer-early", "skills": ["reading"]}, OPEN),
        ({"better": "mlp-early", "than": "ldp-early"}, OPEN),
        ({"better": "qformer-early", "than": "mlp-early", "measure": "kv_cache_bytes_per_image"}, SUPPORTED),
        ({"better": "qformer-early", "than": "mlp-early", "measure": "perplexity_change"}, EQUAL),
    ],
)
def test_verdicts(claim: dict[str, Any], verdict: str) -> None:
    rights = {"mlp-early": 9, "linear-early": 9, "qformer-early": 1}
    results = [result(way, right, 8 if way == "qformer-early" else 16) for way, right in rights.items()]
    told = {one["name"]: answers(rights[one["way"]]) for one in results}
    (found,) = judge([Claim(text="It | is", **claim)], results, told)
    assert found.verdict == verdict
    assert "| It \\| is | **" in to_markdown({"A title": [found]})


def test_who_answers_without_looking_is_named() -> None:
    rights = {"mlp-early": 9, "mlp-late": 4}
    results = [result(way, right, 16) for way, right in rights.items()]
    told = {one["name"]: answers(rights[one["way"]]) for one in results}
    claim = Claim(text="It is", better="mlp-early", than="mlp-late")
    (judged,) = judge([claim], results, told)
    assert "another picture" not in judged.numbers
    for row in told["mlp-late-seed0"]:
        row["control_score"] = row["score"]
    (judged,) = judge([claim], results, told)
    assert judged.verdict == SUPPORTED
    assert judged.numbers.endswith("1 seed; mlp-late is not measurably better than with another picture (40.0 %)")


def test_the_same_seeds_answer_about_the_right_picture_and_another() -> None:
    """Seeds that differ much from each other do not hide that each of them looks."""
    results = [result("mlp-early", right, 16, seed) for seed, right in enumerate((9, 3))]
    results.append(result("linear-early", 1, 16))
    told = {one["name"]: answers(right) for one, right in zip(results, (9, 3, 1), strict=True)}
    for name, other in (("mlp-early-seed0", 7), ("mlp-early-seed1", 1)):
        for number, row in enumerate(told[name]):
            row["control_score"] = float(number % 10 < other)
    (judged,) = judge([Claim(text="It is", better="mlp-early", than="linear-early")], results, told)
    assert "linear-early is not measurably better" in judged.numbers and "mlp-early is not" not in judged.numbers


def found(right: int, seconds: float) -> dict[str, Any]:
    """Of 20 captions, so many whose picture stands first."""
    places = {f"c{number}": 0 if number < right else 3 for number in range(20)}
    shares = {"1": {"accuracy": right / 20, "low": 0.1, "high": 0.9}, "5": {"accuracy": 1.0, "low": 0.8, "high": 1.0}}
    return {"pictures": 20, "recall": shares, "seconds_per_query": seconds, "places": places}


@pytest.mark.parametrize(
    ("measure", "ways", "verdict", "said"),
    [
        ("retrieval", ("mlp-late", "mlp-early"), SUPPORTED, "mlp-late 90.0 %, mlp-early 20.0 %: +70.0 points"),
        ("retrieval", ("mlp-early", "mlp-late"), AGAINST, "; 20 captions, recall@1, 1 seed"),
        ("retrieval", ("mlp-late", "linear-late"), EQUAL, "+0.0 points"),
        ("retrieval", ("mlp-late", "older-late"), OPEN, "older-late was not asked to find pictures"),
        ("seconds_per_query", ("mlp-late", "mlp-early"), SUPPORTED, "4.0 ms a caption against 8.0 s; one seed"),
        ("seconds_per_query", ("mlp-early", "mlp-late"), AGAINST, "8.0 s a caption against 4.0 ms"),
        ("seconds_per_query", ("older-late", "mlp-late"), OPEN, "one of them was not asked to find pictures"),
    ],
)
def test_claims_of_retrieval(measure: Any, ways: tuple[str, str], verdict: str, said: str) -> None:
    results = [result(way, 9, 16) for way in ("mlp-late", "linear-late", "mlp-early", "older-late")]
    for one, (right, seconds) in zip(results, ((18, 0.004), (18, 0.004), (4, 8.0)), strict=False):
        one["retrieval"] = found(right, seconds)
    told = {one["name"]: answers(9) for one in results}
    (judged,) = judge([Claim(text="It is", better=ways[0], than=ways[1], measure=measure)], results, told)
    assert (judged.verdict, said in judged.numbers) == (verdict, True), judged.numbers


def test_seconds_of_several_seeds_have_an_interval() -> None:
    results = []
    for way, seconds in (("mlp-late", (0.004, 0.005)), ("mlp-early", (7.9, 8.1))):
        for seed, each in enumerate(seconds):
            results.append(result(way, 9, 16, seed) | {"retrieval": found(9, each)})
    told = {one["name"]: answers(9) for one in results}
    claim = Claim(text="Faster", better="mlp-late", than="mlp-early", measure="seconds_per_query")
    (judged,) = judge([claim], results, told)
    assert judged.verdict == SUPPORTED
    assert "over seeds" in judged.numbers


@pytest.mark.parametrize(
    ("gates", "verdict"),
    [
        ([0.0, 0.04], SUPPORTED),
        ([0.0, 0.001], AGAINST),
        ([0.5, 0.6], AGAINST),
        ([0.0, 0.0], AGAINST),
        ([], OPEN),
    ],
)
def test_gates_must_start_closed_and_open(gates: list[float], verdict: str) -> None:
    one = result("mlp-intermediate", 9, 16)
    one["training"]["gates"] = gates
    claim = Claim(text="Gates open", better="mlp-intermediate", measure="gates")
    (found,) = judge([claim], [one], {one["name"]: answers(9)})
    assert found.verdict == verdict


def test_gates_that_open_to_nothing_are_no_support() -> None:
    one = result("mlp-intermediate", 4, 16)
    one["training"]["gates"] = [0.0, 0.04]
    rows = answers(4)
    for row in rows:
        row["control_score"] = row["score"]
    claim = Claim(text="Gates open", better="mlp-intermediate", measure="gates")
    (judged,) = judge([claim], [one], {one["name"]: rows})
    assert judged.verdict == BLIND
    assert judged.numbers.endswith("mlp-intermediate is not measurably better than with another picture (40.0 %)")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [((0.0, 3.1), SUPPORTED), ((3.1, 0.0), AGAINST), ((1.2, 3.1), ONCE), ((3.1, 1.2), ONCE), ((0.0, 0.0), EQUAL)],
)
def test_one_run_decides_forgetting_only_where_nothing_can_be_forgotten(
    changes: tuple[float, float], verdict: str
) -> None:
    results = [result(way, 9, 16) for way in ("mlp-early-frozen", "mlp-early")]
    for one, change in zip(results, changes, strict=True):
        one["forgetting"] = {"perplexity_change": {"text": change}}
    told = {one["name"]: answers(9) for one in results}
    claim = Claim(text="Forgets less", better="mlp-early-frozen", than="mlp-early", measure="perplexity_change")
    (judged,) = judge([claim], results, told)
    assert judged.verdict == verdict


def test_a_claim_names_as_many_ways_as_its_measure_takes() -> None:
    with pytest.raises(ValueError, match="than is missing; accuracy compares two ways"):
        Claim(text="A", better="mlp-early")
    with pytest.raises(ValueError, match="than is one too many; gates are told of one way alone"):
        Claim(text="A", better="mlp-intermediate", than="mlp-early", measure="gates")
