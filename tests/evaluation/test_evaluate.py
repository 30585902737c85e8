"""Questions, the shuffled-image control and the choice of metric; the models are functions of what they are shown."""

import errno
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import chiasm
import tiny
from chiasm.data.schema import ImageRef, Sample, SampleError
from chiasm.evaluation.evaluate import EvalResult, choose_metric, evaluate
from chiasm.evaluation.kept import KeptAnswers, identity_of
from chiasm.evaluation.wrong_pictures import wrong_pictures

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
NAMES = {value: name for name, value in COLOURS.items()}


def picture(name: str) -> ImageRef:
    return ImageRef(Image.new("RGB", (4, 4), COLOURS[name]), name)


def ask(text: str, images: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def say(text: str) -> dict:
    return {"role": "assistant", "content": text}


def colour(sample_id: str, name: str, skill: str | None = "colour", **meta) -> Sample:
    return Sample(sample_id, [ask("Which colour?", 1), say(name)], [picture(name)], skill, meta)


def seeing(messages, images):
    return [" and ".join(NAMES[picture.getpixel((0, 0))] for picture in pictures) or "none" for pictures in images]


def blind(messages, images):
    return ["red"] * len(messages)


def test_a_model_that_sees_beats_its_control() -> None:
    samples = [colour(str(i), name) for i, name in enumerate(COLOURS)]
    result = evaluate(seeing, samples, batch_size=3)
    assert [row["correct"] for row in result.rows] == [True] * 4
    assert [row["control_correct"] for row in result.rows] == [False] * 4
    assert result.summary[0]["accuracy"] == 1.0 and result.summary[0]["control_accuracy"] == 0.0
    assert result.summary[0]["gain"] == 1.0 and result.notes == []


def test_a_blind_model_equals_its_control_and_chance() -> None:
    samples = [colour(str(i), name) for i, name in enumerate(COLOURS)]
    (summary,) = evaluate(blind, samples).summary
    assert summary["accuracy"] == summary["control_accuracy"] == summary["chance"] == 0.25
    assert summary["gain"] == 0.0 and summary["gain_low"] < 0 < summary["gain_high"]


def test_every_turn_is_a_question_after_the_true_history() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        ask("First?", 1),
        say("red"),
        ask("Second?", 1),
        say("blue"),
    ]
    sample = Sample("s", messages, [picture("red"), picture("blue")], "colour")
    other = Sample("t", messages, [picture("white"), picture("green")], "colour")
    calls = []

    def generate(prompts, images):
        calls.extend(zip(prompts, images, strict=True))
        return seeing(prompts, images)

    rows = evaluate(generate, [sample, other], control=False).rows
    assert [row["id"] for row in rows] == ["s#1", "s#2", "t#1", "t#2"]
    assert [row["question"] for row in rows] == ["First?", "Second?"] * 2
    assert [row["expected"] for row in rows] == ["red", "blue"] * 2
    assert calls[0][0] == messages[:2] and len(calls[0][1]) == 1
    assert calls[1][0] == messages[:4] and len(calls[1][1]) == 2
    assert rows[1]["answer"] == "red and blue" and rows[1]["sample"] == "s"
    assert "control_answer" not in rows[0]
    controlled = evaluate(generate, [sample, other]).rows
    assert controlled[0]["control_answer"] == "white" and controlled[1]["control_answer"] == "white and green"


def test_text_only_samples_have_no_control() -> None:
    text = Sample("text", [ask("1 + 1?"), say("2")], skill="sums")
    result = evaluate(lambda messages, images: ["2"] * len(messages), [text, colour("a", "red"), colour("b", "blue")])
    assert result.rows[0]["control_score"] is None and result.rows[1]["control_score"] == 0.0
    assert result.summary[0]["control_accuracy"] is None and result.notes == []


def test_an_impossible_control_is_said() -> None:
    one = evaluate(seeing, [colour("only", "red")])
    assert one.rows[0]["control_score"] is None
    assert one.notes == [
        "no shuffled-image control for 1 of 1 samples with images: "
        "no other sample has as many images, all of them different (only)"
    ]
    same = evaluate(seeing, [colour("a", "red"), colour("b", "red")])
    assert "2 of 2" in same.notes[0]
    assert evaluate(seeing, [colour("a", "red")], control=False).notes == []


def test_the_control_has_as_many_images() -> None:
    pair = Sample("pair", [ask("Which?", 2), say("red and blue")], [picture("red"), picture("blue")])
    rows = evaluate(seeing, [pair, colour("a", "red"), colour("b", "green")]).rows
    assert rows[0]["control_score"] is None
    assert rows[1]["control_sample"] == "b" and rows[2]["control_sample"] == "a"


def test_the_control_prefers_the_skill_and_falls_back() -> None:
    samples = [colour("a", "red", "x"), colour("b", "blue", "x"), colour("c", "green", "y"), colour("d", "white", "z")]
    donors, notes = wrong_pictures(samples)
    assert donors[0] == 1 and donors[1] == 0 and notes == []
    assert donors[2] != 2 and donors[3] != 3


@given(names=st.lists(st.sampled_from(list(COLOURS)), min_size=1, max_size=12), seed=st.integers(0, 3))
def test_never_the_same_picture_and_no_picture_twice_if_possible(names: list[str], seed: int) -> None:
    samples = [colour(str(i), name) for i, name in enumerate(names)]
    donors, notes = wrong_pictures(samples, seed)
    assert (donors, notes) == wrong_pictures(samples, seed)
    assert all(names[donor] != names[number] for number, donor in donors.items())
    if len(set(names)) > 1:
        assert set(donors) == set(range(len(names))) and notes == []
    if max(Counter(names).values()) <= len(names) / 2:
        assert sorted(donors.values()) == list(range(len(names)))


@given(
    pairs=st.lists(st.tuples(st.sampled_from(list(COLOURS)), st.sampled_from(list(COLOURS))), min_size=2, max_size=8)
)
def test_no_picture_of_several_is_shared(pairs: list[tuple[str, str]]) -> None:
    samples = [
        Sample(str(i), [ask("?", 2), say("x")], [picture(name) for name in pair]) for i, pair in enumerate(pairs)
    ]
    donors, notes = wrong_pictures(samples)
    assert all(not set(pairs[number]) & set(pairs[donor]) for number, donor in donors.items())
    possible = {i for i, pair in enumerate(pairs) if any(not set(pair) & set(other) for other in pairs)}
    assert set(donors) == possible and bool(notes) == (len(possible) < len(pairs))


def test_the_seed_chooses_the_wrong_pictures() -> None:
    shades = [ImageRef(Image.new("RGB", (2, 2), (i, i, i)), str(i)) for i in range(30)]
    samples = [Sample(str(i), [ask("?", 1), say("x")], [shade]) for i, shade in enumerate(shades)]
    assert wrong_pictures(samples, 0)[0] != wrong_pictures(samples, 1)[0]


def test_skills_without_a_name_fall_under_all() -> None:
    result = evaluate(seeing, [colour("a", "red", None), colour("b", "blue", None)])
    assert [row["skill"] for row in result.summary] == ["all"]


def test_further_answers_are_accepted() -> None:
    result = evaluate(
        lambda m, i: ["Crimson!"] * len(m), [colour("a", "red", answers=["red", "crimson"])], control=False
    )
    assert result.rows[0]["correct"] and result.rows[0]["references"] == ["red", "crimson"]


def test_ten_annotators_are_vqa_accuracy() -> None:
    sample = colour("a", "red", answers=["red"] * 8 + ["dark red"] * 2)
    result = evaluate(lambda m, i: ["dark red"] * len(m), [sample], control=False)
    assert result.rows[0]["metric"] == "vqa_accuracy"
    assert result.rows[0]["score"] == pytest.approx(0.6) and result.rows[0]["expected"] == "red"


def test_captions_report_f1_and_anls() -> None:
    text = "a small red house stands beside a tree"
    sample = Sample("a", [ask("Describe.", 1), say(text)], [picture("red")], "caption")
    result = evaluate(lambda m, i: ["a small red house"] * len(m), [sample, colour("b", "blue")], control=False)
    assert [row["metric"] for row in result.rows] == ["token_f1", "exact_match"]
    # without articles the answer has 3 words, the caption 6, and they share 3
    assert result.rows[0]["score"] == pytest.approx(2 * 3 / (3 + 6))
    caption, colours, everything = result.summary
    assert caption["anls"] == 0.0 and caption["chance"] is None
    assert "anls" not in colours and everything["metric"] == "mixed"


def test_choice_of_metric() -> None:
    assert choose_metric([["red"], ["a house"]]) == "exact_match"
    assert choose_metric([["빨간색 자동차"], ["고양이"]]) == "exact_match"
    assert choose_metric([["there are two red houses on the hill"]]) == "token_f1"
    assert choose_metric([["一只红色的猫坐在沙发上看着窗外的小鸟"]]) == "token_f1"
    assert choose_metric([["red"] * 10, ["red"] * 3]) == "exact_match"
    result = evaluate(seeing, [colour("a", "red")], control=False, metric="contains")
    assert result.rows[0]["metric"] == "contains"


def test_verbose_answers_are_wrong_but_contain() -> None:
    (summary,) = evaluate(lambda m, i: ["It is red."], [colour("a", "red")], control=False).summary
    assert summary["accuracy"] == 0.0 and summary["contains"] == 1.0


def test_progress_counts_every_answer() -> None:
    seen = []
    samples = [colour(str(i), name) for i, name in enumerate(COLOURS)]
    evaluate(seeing, samples, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (4, 8), (7, 8), (8, 8)]


def test_batch_size_changes_nothing() -> None:
    samples = [colour(str(i), name) for i, name in enumerate(list(COLOURS) * 2)]
    assert evaluate(seeing, samples, batch_size=1) == evaluate(seeing, samples, batch_size=5)


def test_the_users_mistakes_are_named() -> None:
    red = colour("a", "red")
    with pytest.raises(ValueError, match="samples is empty"):
        evaluate(seeing, [])
    with pytest.raises(ValueError, match="metric is 'bleu', expected one of exact_match"):
        evaluate(seeing, [red], metric="bleu")
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(seeing, [red], batch_size=0)
    with pytest.raises(ValueError, match="gave 2 answers to 1 questions"):
        evaluate(lambda messages, images: ["x", "y"], [red])
    with pytest.raises(SampleError, match=r"'b'.*1 image placeholder.*0 images"):
        evaluate(seeing, [Sample("b", [ask("?", 1), say("x")])])
    with pytest.raises(SampleError, match="'c'"):
        evaluate(seeing, [Sample("c", [ask("?", 1)], [picture("red")])])


def test_a_sample_that_comes_twice_is_numbered() -> None:
    red, blue, taken = colour("a", "red"), colour("b", "blue"), colour("a (2)", "green")
    two = Sample("c", [ask("Which?", 1), say("red"), ask("Sure?"), say("yes")], [picture("red")])
    rows = evaluate(seeing, [red, blue, red, taken, red, two, two]).rows
    assert [row["id"] for row in rows][:5] == ["a", "b", "a (3)", "a (2)", "a (4)"]
    assert [row["id"] for row in rows][5:] == ["c#1", "c#2", "c (2)#1", "c (2)#2"]
    assert [row["sample"] for row in rows][:5] == ["a", "b", "a", "a (2)", "a"]
    assert rows[0]["control_sample"] != "a"


def test_results_survive_the_disk(tmp_path) -> None:
    samples = [colour("가", "red"), colour("b\u2028", "blue"), Sample("t", [ask("?"), say("x")])]
    result = evaluate(seeing, samples)
    result.shuffled_loss = 2.5
    folder = result.save(tmp_path / "new" / "eval")
    assert EvalResult.load(folder) == result
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0])["sample"] == "가" and "가" in lines[0]


class Asked:
    """A model that sees, and counts what it is asked; it is stopped before its `dies_at`-th batch."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at, self.batches = dies_at, 0

    def __call__(self, messages, images):
        if self.batches == self.dies_at:
            raise KeyboardInterrupt
        self.batches += 1
        return seeing(messages, images)


def stopped(samples: list[Sample], file: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(Asked(after), samples, batch_size=3, kept=KeptAnswers(file, "a"))


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    samples = [
        replace(colour(str(i), name), messages=[ask(f"Colour {i}?", 1), say(name)])
        for i, name in enumerate([*COLOURS] * 3)
    ]
    whole, again = evaluate(seeing, samples, batch_size=3), Asked()
    for after in (3, 2):  # of eight batches, four with wrong pictures; three are there already at the second time
        stopped(samples, tmp_path / "new" / "answers", after)
    with (tmp_path / "new" / "answers").open("a") as file:
        file.write('{"batch": "cut o')
    assert evaluate(again, samples, batch_size=3, kept=KeptAnswers(tmp_path / "new" / "answers", "a")) == whole
    assert again.batches == 3
    last = Asked(0)
    assert evaluate(last, samples, batch_size=3, kept=KeptAnswers(tmp_path / "new" / "answers", "a")) == whole


@pytest.mark.parametrize("change", ["model or settings", "batch", "question", "picture"])
def test_answers_are_kept_for_the_same_question_alone(tmp_path: Path, change: str) -> None:
    samples = [colour(str(i), name) for i, name in enumerate(COLOURS)]
    stopped(samples, tmp_path / "answers", 1)
    if change == "question":
        samples[1] = replace(samples[1], messages=[ask("Colour?", 1), say("green")])
    if change == "picture":
        samples[1] = replace(samples[1], images=[picture("white")])
    kept = KeptAnswers(tmp_path / "answers", "b" if change == "model or settings" else "a")
    asked = Asked()
    evaluate(asked, samples, batch_size=2 if change == "batch" else 3, control=False, kept=kept)
    assert asked.batches == 2


def test_who_is_asked_is_known_by_weights_and_settings() -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer())
    first = identity_of(vlm.model, vlm.processor, max_new_tokens=4)
    assert identity_of(vlm.model, vlm.processor, max_new_tokens=4) == first
    assert identity_of(vlm.model, vlm.processor, max_new_tokens=5) != first
    vlm.processor.tokenizer.chat_template += " "
    second = identity_of(vlm.model, vlm.processor, max_new_tokens=4)
    next(vlm.model.connector.parameters()).data[0, 0] += 1e-3
    assert len({first, second, identity_of(vlm.model, vlm.processor, max_new_tokens=4)}) == 3


def test_a_full_disk_stops_with_the_answers_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [colour(str(i), name) for i, name in enumerate(COLOURS)]
    stopped(samples, tmp_path / "answers", 1)
    kept = KeptAnswers(tmp_path / "answers", "a")

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="answers is not written: the disk is full"):
        patch.setattr(Path, "open", full)
        evaluate(seeing, samples, batch_size=3, kept=kept)
    assert len(KeptAnswers(tmp_path / "answers", "a").known) == 1


def test_a_full_disk_leaves_the_older_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **_: object) -> int:
        self.write_bytes(text.encode()[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    older = evaluate(seeing, [colour("a", "red")])
    older.save(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"results\.jsonl is not written: the disk is full"):
        evaluate(seeing, [colour("b", "blue")]).save(tmp_path)
    assert EvalResult.load(tmp_path) == older


def test_rows_name_the_picture_file(tmp_path) -> None:
    path = tmp_path / "red.png"
    picture("red").load().save(path)
    sample = Sample("a", [ask("Which colour?", 1), say("red")], [ImageRef.of(path)])
    rows = evaluate(seeing, [sample, colour("b", "blue")]).rows
    assert rows[0]["image"] == str(path) and rows[1]["image"] is None
