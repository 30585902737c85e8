"""CIDEr and BLEU of captions: the libraries' numbers, only where captions are, and a note where they are missing."""

import pytest
from test_run_report import samples

from chiasm.data.schema import Sample
from chiasm.evaluation import captions
from chiasm.evaluation.evaluate import evaluate
from chiasm.evaluation.skills import caption_lines

REFERENCES = [
    ["a red ball lies on the green grass", "the ball is red"],
    ["두 사람이 강가를 걷는다"],
    ["three birds on a wire"],
]


def described(count: int = 4) -> list[Sample]:
    texts = ["a small red ball lies on the grass", "two people walk by a wide river", "three birds sit on a thin wire"]
    made = samples(count, skills=("captions",))
    for index, sample in enumerate(made):
        sample.messages[-1]["content"] = texts[index % 3]
    return made


@pytest.mark.skipif(not captions.available(), reason="pycocoevalcap or sacrebleu is not installed")
def test_perfect_captions_and_others() -> None:
    perfect = [texts[0] for texts in REFERENCES]
    scores = captions.cider(perfect, REFERENCES)
    assert len(scores) == 3 and all(score > 3 for score in scores)
    assert captions.cider(perfect[::-1], REFERENCES)[0] < 0.5
    assert captions.bleu(perfect, REFERENCES) == pytest.approx(100) and captions.bleu(["no"] * 3, REFERENCES) < 1


@pytest.mark.skipif(not captions.available(), reason="pycocoevalcap or sacrebleu is not installed")
def test_an_evaluation_of_captions_has_them() -> None:
    result = evaluate(lambda messages, images: ["a small red ball lies on the grass"] * len(messages), described())
    row = result.summary[-1]
    assert row["cider_low"] <= row["cider"] <= row["cider_high"] and 0 < row["bleu"] < 100
    assert caption_lines(result.summary)[0].startswith("captions: CIDEr ")
    short = evaluate(lambda messages, images: ["answer 1"] * len(messages), samples(4))
    assert "cider" not in short.summary[-1] and short.notes == []


def test_without_the_libraries_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    result = evaluate(lambda messages, images: ["a ball"] * len(messages), described())
    assert result.notes == [captions.MISSING] and "cider" not in result.summary[-1]
