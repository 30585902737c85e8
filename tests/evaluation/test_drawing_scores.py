"""Drawings are scored by hand, by a draughtsman that is always right or never, and of a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import chiasm
import chiasm.api
import tiny
from chiasm.data.drawing import drawn
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.data.schema import ImageRef, Sample, text_of
from chiasm.evaluation import drawing
from chiasm.evaluation.evaluate import EvalResult
from chiasm.vision.image_processor import ChiasmImageProcessor

VQ = {"name": "vq", "image_size": [16, 16], "levels": [4, 3], "width": 8, "depth": 1}
SHADES = [(red, green, 90) for red in (10, 130, 250) for green in (10, 80, 160, 250)]


def sample(index: int, words: str | None) -> Sample:
    shown = Image.new("RGB", (20, 20), SHADES[index % len(SHADES)])
    return Sample(f"s{index}", drawn(words), [ImageRef.of(shown, f"picture {index}")])


SAMPLES = [sample(index, f"shade {index}") for index in range(12)]


def connect() -> chiasm.VLM:
    return chiasm.connect(language=tiny.language(), fusion="unified", image_input=VQ, tokenizer=tiny.tokenizer())


def hand(monkeypatch: pytest.MonkeyPatch, off: int) -> chiasm.VLM:
    """A model that draws, for each words, the true picture `off` places behind its own."""
    plain = torch.tensor(SHADES)[:, :, None, None].expand(-1, -1, 16, 16) / 127.5 - 1

    def codes(model: Any, processor: Any, asked: list[list[dict]], brush: Any) -> torch.Tensor:
        numbers = [int(text_of(messages[-1]["content"]).split()[-1]) for messages in asked]
        return torch.tensor([[(number + off) % len(SHADES)] for number in numbers])

    monkeypatch.setattr(drawing, "draw_codes", codes)
    vlm = connect()
    vision: Any = vlm.model.vision
    vision.encode = lambda pixels: torch.cdist(pixels.flatten(1), plain.flatten(1)).argmin(1)[:, None]
    vision.decode = lambda codes: plain[codes[:, 0]]
    return vlm


@pytest.mark.parametrize(("off", "share"), [(0, 1.0), (5, 0.0)])
def test_a_right_hand_and_a_wrong_one(monkeypatch: pytest.MonkeyPatch, off: int, share: float) -> None:
    vlm = hand(monkeypatch, off)
    found = drawing.evaluate_drawings(
        vlm.model, vlm.processor, SAMPLES, judge=lambda images: torch.eye(12)[: len(images)], batch_size=16
    )
    assert [row["skill"] for row in found.summary] == [
        f"by {what}, recall@{k}" for what in ("colours", "the judge") for k in (1, 5)
    ]
    first, judged = found.summary[0], found.summary[2]
    assert first["accuracy"] == share and first["chance"] == pytest.approx(1 / 12)
    assert first["n"] == first["control_n"] == 12 and first["control_accuracy"] <= (0.0 if share else 1.0)
    assert judged["accuracy"] == 1.0, "the judge's vectors decide, whatever was drawn"
    assert first["tokenizer_accuracy"] == 1.0 and first["tokenizer_psnr"] > 40
    assert (first["psnr"] > 40) == bool(share) and (first["psnr_gain_low"] > 20) == bool(share)
    assert found.rows[3]["nearest"] == f"s{(3 + off) % 12}" and found.rows[3]["question"] == "Draw: shade 3"
    assert f"PSNR to its own true picture {first['psnr']:.2f} dB" in found.notes[0]
    assert "given back" not in found.notes[0] and "gives the true pictures back at" in found.notes[1]


def test_psnr_by_hand() -> None:
    true = torch.zeros(2, 3, 16, 16)
    true[1] += 1
    assert drawing.psnr(true + 0.2, true)[:, 0].tolist() == pytest.approx(
        [20.0, 20 * torch.log10(torch.tensor(2 / 1.2)).item()]
    )


def test_small_shifts_and_noise_are_smoothed_away() -> None:
    """A checker of single pixels is, smoothed, the grey that it is made of; by the pixel it is far from it."""
    checker = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1).expand(1, 3, -1, -1)
    grey, light = torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 0.4)
    assert drawing.nearness(checker, torch.cat([grey, light])).argmax() == 0


def test_requests_are_taken_once_and_known_ones_left_out() -> None:
    told = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a cat"}]
    answered = Sample("told", told, SAMPLES[0].images)
    mixed = [sample(0, "a"), sample(1, None), sample(2, "b"), sample(3, "a"), answered, sample(4, "c")]
    kept, notes = drawing.requests(mixed, drawing.known_requests([sample(7, "c"), sample(8, None)]))
    assert [one.id for one in kept] == ["s0", "s2"]
    assert notes == ["requests left out, since they are known: 1"]
    with pytest.raises(ValueError, match="no sample asks for a picture in words"):
        drawing.requests([answered, sample(1, None)])
    with pytest.raises(ValueError, match="all 1 requests for a picture are known"):
        drawing.requests([sample(1, "a")], ["Draw: a"])


def test_a_tiny_model_through_the_verb(tmp_path: Path, run: Any) -> None:
    connect().save_pretrained(tmp_path / "model")
    rows = []
    for index, one in enumerate(SAMPLES):
        one.images[0].load().save(tmp_path / f"{index}.png")
        rows.append({"messages": one.messages, "images": [f"{index}.png"]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    ask = ("eval", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--task", "drawing", "--batch-size", "5")
    code, out, err = run(*ask, "--not-in", tmp_path / "known.jsonl", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [row["n"] for row in told["summary"]] == [8, 8] and told["summary"][0]["control_n"] == 8
    assert told["notes"][0] == "requests left out, since they are known: 4"
    code, out, err = run(*ask, "--limit", "6", "-o", tmp_path / "scores")
    assert code == 0 and "PSNR to its own true picture" in out, err
    assert len(EvalResult.load(tmp_path / "scores").rows) == 6
    with Image.open(tmp_path / "scores/sheet.png") as sheet:
        assert sheet.width > 1000 and len(sheet.convert("RGB").getcolors(1 << 20) or []) > 10
    for option, told in (
        (("--shots", "2"), "shots=2 is not for task 'drawing'"),
        (("--max-new-tokens", "9"), "--max-new-tokens 9 is for answers in words"),
        (("--judge", tmp_path / "model"), "gives no vector a picture; name a model of two towers"),
    ):
        code, _, err = run(*ask, *option)
        assert code == 2 and told in " ".join(err.split())
    code, _, err = run(*ask[:4])
    assert (
        code == 2
        and "nothing to answer in words; requests for a picture, which task drawing scores: 12" in " ".join(err.split())
    )


def test_a_judge_of_two_towers_and_other_models() -> None:
    towers = chiasm.connect(
        tiny.vision(),
        tiny.language(),
        {"name": "linear", "space": 9},
        "late",
        tokenizer=tiny.tokenizer(),
        image_processor=ChiasmImageProcessor(30, [0.5] * 3, [0.5] * 3),
    )
    found = chiasm.api.evaluate(connect(), SAMPLES, task="drawing", judge=towers, control=False)
    assert len(found.summary) == 4 and found.summary[0]["control_n"] == 0
    for model in (towers, connect()):
        task = "answers" if model is not towers else "retrieval"
        with pytest.raises(ValueError, match="not_in='emoji-scenes' is not for task"):
            chiasm.api.evaluate(model, SAMPLES, task=task, not_in="emoji-scenes")
    with pytest.raises(ValueError, match="task 'drawing' is not one of this model; choose of answers, retrieval"):
        chiasm.api.evaluate(towers, SAMPLES, task="drawing")


def test_answers_in_words_leave_requests_for_pictures_out() -> None:
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Shade?"}]}]
    told = [
        Sample(f"t{i}", [*asked, {"role": "assistant", "content": "red"}], one.images) for i, one in enumerate(SAMPLES)
    ]
    found = chiasm.api.evaluate(connect(), [*SAMPLES, *told[:5]], max_new_tokens=2)
    assert [row["sample"] for row in found.rows] == [f"t{i}" for i in range(5)]
    assert "left out: requests for a picture, which task drawing scores: 12" in found.notes


def test_captions_can_always_tell_places(tmp_path: Path) -> None:
    some, all_ = (EmojiScenes("test", 60, form="caption", artwork=tmp_path, places=places) for places in (False, True))
    assert 10 < sum(" in the " not in one.answer for one in some) < 30
    assert all(" in the " in one.answer for one in all_)
    assert [one.meta["objects"] for one in some] == [one.meta["objects"] for one in all_]
