"""Metrics against values computed by hand, and the properties that hold for any text."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.evaluation.metrics import (
    METRICS,
    anls,
    contains,
    exact_match,
    fold,
    levenshtein,
    normalise,
    normalise_vqa,
    token_f1,
    tokens,
    vqa_accuracy,
)

TEXT = st.text(max_size=40)
WORDS = st.lists(st.sampled_from(["red", "cat", "3", "house", "빨간", "猫", "x-ray"]), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("A red  car.", "red car"),
        ("Three", "3"),
        ("three cats", "3 cats"),
        ("Twenty-one", "21"),
        ("forty two", "42"),
        ("THE CAT!", "cat"),
        ('"The cat"', "cat"),
        ("don't", "dont"),
        ("don’t", "dont"),
        ("1,000", "1000"),
        ("−3", "-3"),
        ("a T-shirt", "t-shirt"),
        ("１２", "12"),
        ("٣", "3"),
        ("१२", "12"),
        ("三", "3"),
        ("셋", "3"),
        ("빨간색입니다。", "빨간색입니다"),
        (unicodedata.normalize("NFD", "고양이"), "고양이"),
        ("ﬁsh", "fish"),
        ("Straße", "STRASSE"),
        ("❤️", "❤"),
        ("हाँ।", "हाँ"),
        ("¿Qué?", "qué"),
    ],
)
def test_equal_answers(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("cat", "cats"),
        ("A", "the"),
        ("A", ""),
        ("A", "B"),
        ("A, C", "C"),
        ("vitamin a", "vitamin"),
        ("3.5", "35"),
        ("-3", "3"),
        ("3-4", "-34"),
        ("10:30", "1030"),
        ("1/2", "12"),
        ("?", "!"),
        ("", "cat"),
        ("हाँ", "हा"),
        ("고양이", "고양"),
        ("thirteen", "30"),
    ],
)
def test_different_answers(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 0.0


def test_exact_match_takes_the_best_of_several_references() -> None:
    assert exact_match("automobile", ["car", "automobile"]) == 1.0
    assert exact_match("van", ["car", "automobile"]) == 0.0


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_no_reference_is_an_error(metric) -> None:
    with pytest.raises(ValueError, match="at least one accepted answer"):
        metric("cat", [])


def test_contains_needs_whole_words_in_one_piece() -> None:
    assert contains("It is a red car, I think.", "red car") == 1.0
    assert contains("There are three of them", "3") == 1.0
    assert contains("category", "cat") == 0.0
    assert contains("red and blue car", "red car") == 0.0
    assert contains("이것은 고양이입니다", "고양이") == 1.0
    assert contains("これは猫です", "猫") == 1.0
    assert contains("cat", "it is a cat") == 0.0


def test_tokens_of_unspaced_scripts_are_characters() -> None:
    assert tokens("A red car") == ["red", "car"]
    assert tokens("고양이 2마리") == ["고", "양", "이", "2", "마", "리"]
    assert tokens("红色 car") == ["红", "色", "car"]


def test_token_f1_by_hand() -> None:
    # answer {red, car, on, grass}, reference {red, car}: precision 2/4, recall 2/2 -> 2/3
    assert token_f1("a red car on grass", "the red car") == pytest.approx(2 / 3)
    # bags, not sets: {red: 2, car} against {red, car: 2} share 2 of 3 and 3
    assert token_f1("red red car", "red car car") == pytest.approx(2 / 3)
    # syllables: 고양이가 (4) and 고양이 (3) share 3 -> 6/7
    assert token_f1("고양이가", "고양이") == pytest.approx(6 / 7)
    assert token_f1("dog", ["cat", "big dog"]) == pytest.approx(2 / 3)
    assert token_f1("", "cat") == 0.0


def test_levenshtein_by_hand() -> None:
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "abc") == 3
    assert levenshtein("flaw", "lawn") == 2


def test_anls_by_hand() -> None:
    assert anls("Hello World", "hello  world") == 1.0
    assert anls("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    # distance 2 of 4 is exactly the threshold: not below it, so 0
    assert anls("abxy", "abcd") == 0.0
    assert anls("abxy", "abcd", threshold=0.51) == pytest.approx(0.5)
    assert anls("abxy", ["zzzz", "abcy"]) == pytest.approx(0.75)
    assert anls("고양이", "고양2") == pytest.approx(2 / 3)
    assert anls("", "") == 1.0


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_annotators(agree: int, score: float) -> None:
    assert vqa_accuracy("Yes", ["yes"] * agree + ["no"] * (10 - agree)) == pytest.approx(score)


def test_vqa_accuracy_of_few_references() -> None:
    assert vqa_accuracy("yes", "yes") == 1.0
    assert vqa_accuracy("yes", ["yes", "yes"]) == 1.0
    # leave each out in turn: the others who agree are 0 of 1, then 1 of 1
    assert vqa_accuracy("yes", ["yes", "no"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Black-and-white", "black and white"),
        ("yes, sir", "yes sir"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("None", "0"),
        ("the ten", "10"),
        ("eleven", "eleven"),
        ("Don't", "dont"),
        ("a", "a"),
        ("빨간색", "빨간색"),
    ],
)
def test_vqa_normalisation(text: str, normal: str) -> None:
    assert normalise_vqa(text) == normal


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@given(answer=TEXT, references=st.lists(TEXT, min_size=1, max_size=11))
def test_every_metric_is_a_fraction_and_ignores_case_and_order(metric, answer: str, references: list[str]) -> None:
    score = metric(answer, references)
    assert 0.0 <= score <= 1.0
    assert metric(answer, references[::-1]) == pytest.approx(score)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@given(text=TEXT)
def test_an_answer_matches_itself(metric, text: str) -> None:
    assert metric(text, text) == 1.0


@given(answer=TEXT, reference=TEXT)
def test_symmetric_metrics(answer: str, reference: str) -> None:
    for metric in (exact_match, token_f1, anls):
        assert metric(answer, reference) == pytest.approx(metric(reference, answer))


@given(words=WORDS, before=st.sampled_from(["", " ", "\n"]), after=st.sampled_from(["", ".", "!", " ?", "。"]))
def test_normalise_ignores_what_surrounds_the_words(words: list[str], before: str, after: str) -> None:
    text = " ".join(words)
    assert normalise(before + text.upper() + after) == normalise(text)
    assert normalise(f"the {text}") == normalise(text)


@given(text=TEXT)
def test_fold_is_idempotent(text: str) -> None:
    assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize("word", ["zero", "ten", "twelve", "nineteen", "twenty", "ninety nine", "thirty-one", "열"])
def test_number_words(word: str) -> None:
    expected = {"zero": 0, "ten": 10, "twelve": 12, "nineteen": 19, "twenty": 20, "ninety nine": 99, "thirty-one": 31}
    assert normalise(word) == str(expected.get(word, 10))


@given(a=TEXT, b=TEXT, c=TEXT)
def test_levenshtein_is_a_metric(a: str, b: str, c: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert (levenshtein(a, b) == 0) == (a == b)
