"""Forgetting: nothing at all where everything is frozen, more at a high rate than at a low one, in log and report."""

import json
import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from PIL import Image

from chiasm.data.readers import read
from chiasm.training.forgetting import ForgettingProbe, knn_overlap, linear_cka, perplexity
from chiasm.training.log import read_log
from chiasm.training.schema import Forgetting

PARTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "lora": {part: {"tune": "lora", "lr": 1e-3, "rank": 2} for part in ("language", "vision")},
    "low": {part: {"tune": "full", "lr": 1e-4} for part in ("language", "vision")},
    "high": {part: {"tune": "full", "lr": 1e-2} for part in ("language", "vision")},
}


def measured(folder: Path, kind: str, dtype: str = "float32", **more: Any) -> list[dict[str, Any]]:
    parts = {**helpers.LORA, "language": "frozen", **PARTS[kind]}
    recipe = {"forgetting": {}, "stages": [helpers.stage(parts=parts, steps=6, dtype=dtype)], **more}
    result = helpers.run(folder / kind, recipe, data=helpers.samples(24))
    return [event for event in read_log(result.log) if event["event"] == "forgetting"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_parts_forget_exactly_nothing(tmp_path: Path, dtype: str) -> None:
    before, after = measured(tmp_path, "frozen", dtype)
    assert "stage" not in before and after["stage"] == "align" and after["step"] == 6
    assert before["perplexity"] == after["perplexity"] and set(after["perplexity"]) == {"english", "korean"}
    assert after["perplexity_change"] == {"english": 0.0, "korean": 0.0}
    assert after["knn_overlap"] == 1.0 and after["cka"] == 1.0


def test_a_higher_rate_forgets_more(tmp_path: Path) -> None:
    lora, low, high = (measured(tmp_path, kind)[-1] for kind in ("lora", "low", "high"))
    assert all(event["perplexity_change"]["english"] != 0 and event["cka"] < 1 for event in (lora, low, high))
    assert abs(low["perplexity_change"]["english"]) < abs(high["perplexity_change"]["english"])
    assert low["cka"] > high["cka"] and low["knn_overlap"] >= high["knn_overlap"]


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    assert measured(tmp_path, "frozen", forgetting=helpers.FORGETTING_OFF) == []
    only_text = measured(tmp_path / "text", "frozen", forgetting={"pictures": 0})[-1]
    assert "cka" not in only_text and only_text["perplexity"]


def test_perplexity_is_that_of_the_language_model_alone() -> None:
    vlm = helpers.vlm()
    text = "a short text " * 30
    ids = torch.tensor([vlm.processor.tokenizer(text)["input_ids"]])
    losses = []
    for window in ids.split(256, dim=1):
        logits = vlm.model.language(input_ids=window).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none"))
    expected = math.exp(torch.cat(losses).mean().item())
    assert perplexity(vlm.model.eval(), vlm.processor.tokenizer, text) == pytest.approx(expected, rel=1e-5)


def test_the_measures_know_sameness_rotation_and_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(60, 40, generator=generator) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    assert knn_overlap(one, one) == 1.0 and linear_cka(one, one) == 1.0
    assert linear_cka(one, 3 * one @ rotation) == pytest.approx(1.0) and knn_overlap(one, 3 * one @ rotation) > 0.99
    assert linear_cka(one, other) < 0.6 and knn_overlap(one, other) < 0.3
    assert linear_cka(one[:1].expand(4, 40), one[:1].expand(4, 40)) == 1.0


def test_pictures_come_from_the_samples_that_can_be_used(tmp_path: Path) -> None:
    for index in range(12):
        Image.new("RGB", (30, 30), (20 * index, 0, 0)).save(tmp_path / f"{index}.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": f"{index}.png", "conversations": said[: 1 + (index % 3 != 1)]} for index in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    vlm = helpers.vlm()
    probe = ForgettingProbe(Forgetting(text=False), vlm.model, vlm.processor, read(tmp_path / "data.json"))
    assert probe.fields()["pictures"] == 8
