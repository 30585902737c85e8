"""Late fusion under the ordinary trainer: locked towers, gradient caching, resume, and a head that answers."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import chiasm
import chiasm.api
import tiny
from chiasm.data.schema import Sample
from chiasm.training.log import read_log

LOCKED = {"vision": "frozen", "language": "frozen", "connector": {"tune": "full", "lr": 1e-2}}
LIT = {**LOCKED, "language": {"tune": "full", "lr": 1e-3}}
LORA = {**LIT, "vision": {"tune": "lora", "lr": 1e-2, "rank": 3}, "language": {"tune": "lora", "lr": 1e-2, "rank": 3}}
HEAD = {"*": "frozen", "answer_head": {"tune": "full", "lr": 1e-2}}


def stage(**settings: Any) -> dict[str, Any]:
    return helpers.stage(**{"name": "contrast", "parts": LOCKED, "objectives": ["contrastive"], **settings})


def data(count: int = 24) -> list[Sample]:
    return [helpers.sample(index) for index in range(count)]


def events(result: Any, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_log(result.log) if event["event"] == kind]


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {
        name.split(".")[0] for name, tensor in helpers.weights(model).items() if not torch.equal(tensor, before[name])
    }


def check_same_scores(one: chiasm.DualEncoder, other: chiasm.DualEncoder) -> None:
    scores = [encoder.score(tiny.picture(), ["red", "a"]) for encoder in (one, other)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", ["contrastive", "sigmoid"])
@pytest.mark.parametrize("parts", [LOCKED, LIT])
def test_a_stage_changes_what_it_names(objective: str, parts: dict[str, Any], tmp_path: Path) -> None:
    model = helpers.dual_encoder(logit_bias=-5.0 if objective == "sigmoid" else None)
    before = helpers.weights(model)
    result = helpers.run(tmp_path / "run", {"stages": [stage(objectives=[objective], parts=parts)]}, model, data())
    assert moved(model, before) == {part for part, plan in parts.items() if plan != "frozen"}
    assert not events(result, "warning")
    again = chiasm.load(result.model)
    assert isinstance(again, chiasm.DualEncoder)
    check_same_scores(again, model)


@pytest.mark.parametrize("vision", ["siglip", "dinov2", "convnext"])
def test_lora_in_both_towers(vision: str, tmp_path: Path) -> None:
    model = helpers.dual_encoder(vision, "gpt2")
    if vision == "convnext":
        parts: dict[str, Any] = {**LORA, "vision": {"tune": "full", "lr": 1e-3}}
    else:
        parts = LORA
    before = helpers.weights(model)
    result = helpers.run(tmp_path / "run", {"stages": [stage(parts=parts, chunk=2)]}, model, data())
    assert moved(model, before) == {"vision", "language", "connector"}
    check_same_scores(chiasm.load(result.model), model)


def test_learning_tells_captions_apart_beside_the_shuffled_control(tmp_path: Path) -> None:
    settings = stage(steps=60, batch_size=8, parts=LIT, validation={"samples": 8})
    result = helpers.run(
        tmp_path / "run", {"stages": [settings]}, helpers.dual_encoder(), data(48)[8:], validation_samples=data(48)[:8]
    )
    first, last = events(result, "validation")
    assert last["loss"] < first["loss"] and last["loss"] < last["shuffled_loss"]


def test_chunks_change_nothing(tmp_path: Path) -> None:
    runs = {}
    for chunk in (None, 3):
        model = helpers.dual_encoder()
        result = helpers.run(
            tmp_path / str(chunk), {"stages": [stage(parts=LIT, batch_size=8, chunk=chunk)]}, model, data()
        )
        runs[chunk] = ([event["loss"] for event in events(result, "step")], helpers.weights(model))
    assert runs[3][0] == pytest.approx(runs[None][0], abs=1e-5)
    for name, tensor in runs[None][1].items():
        torch.testing.assert_close(runs[3][1][name], tensor, rtol=1e-4, atol=1e-4)


def test_vectors_of_a_frozen_text_tower_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for kept in (100, 0):
        monkeypatch.setattr("chiasm.training.late_stage.KEPT_TEXTS", kept)
        result = helpers.run(tmp_path / str(kept), {"stages": [stage()]}, helpers.dual_encoder(), data())
        runs.append([event["loss"] for event in events(result, "step")])
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


TWO = {
    "stages": [
        stage(parts={**LIT, "vision": {"tune": "full", "lr": 1e-3}}, steps=3),
        stage(name="answer", objectives=["answers"], parts=HEAD, steps=3, answer_head={"hidden": 9}),
    ]
}


@pytest.mark.parametrize("dies_at", [2, 5, 8])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, dies_at: int) -> None:
    """The last stage is one after the head was made."""
    stages = [*TWO["stages"], stage(name="again", parts={**LIT, "answer_head": "frozen"}, steps=3)]
    settings = {"stages": [{**s, "checkpoint_every": 1} for s in stages]}
    helpers.whole_and_resumed(tmp_path, settings, helpers.dual_encoder, data(), dies_at)


def test_the_preview_knows_the_head_of_an_earlier_stage() -> None:
    stages = [*TWO["stages"], stage(name="again", parts={**LIT, "answer_head": "frozen"}, steps=3)]
    model = helpers.dual_encoder()
    *_, again = chiasm.api.preview({"stages": stages}, model, data(), quiet=True)
    assert again.plan.states["answer_head"] == "frozen"
    assert model.model.config.answer_head is None
    with pytest.raises(ValueError, match="'answer' takes its answers from the data; pass --data"):
        chiasm.api.preview({"stages": stages}, model)


@pytest.mark.parametrize("combine", ["concat", "product", "mlp"])
def test_a_head_learns_to_answer_and_leaves_the_towers(combine: str, tmp_path: Path) -> None:
    model = helpers.dual_encoder()
    cosines = model.score(tiny.picture(), ["red", "green"])
    settings = stage(
        name="answer", objectives=["answers"], parts=HEAD, steps=60, batch_size=8, validation={"samples": 8}
    )
    settings["answer_head"] = {"combine": combine, "hidden": 12}
    result = helpers.run(
        tmp_path / "run", {"stages": [settings]}, model, data(48), generate=model.generate, validation_samples=data(8)
    )
    first, last = events(result, "validation")
    assert last["loss"] < first["loss"] and last["loss"] < last["shuffled_loss"]
    assert last["answers"][0]["correct"]
    again = chiasm.load(result.model)
    assert again.model.config.answer_head["answers"] == ["blue", "green", "grey", "red"]
    pictures = [sample.images[0].load() for sample in data(4)]
    given = again.answer(pictures, ["colour"] * 4)
    assert sum(a == b for a, b in zip(given, ["red", "green", "blue", "grey"], strict=True)) >= 3
    torch.testing.assert_close(again.score(tiny.picture(), ["red", "green"]), cosines, rtol=0, atol=1e-6)


def test_answers_beyond_the_list_teach_nothing(tmp_path: Path) -> None:
    settings = stage(name="answer", objectives=["answers"], parts=HEAD, answer_head={"most": 2})
    model = helpers.dual_encoder()
    result = helpers.run(tmp_path / "run", {"stages": [settings]}, model, data())
    assert model.model.config.answer_head["answers"] == ["blue", "green"]
    assert sum(event["supervised_tokens"] for event in events(result, "step")) < 16


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"objectives": ["next_token"]}, "objective 'next_token' is not for fusion 'late'"),
        ({"objectives": ["sigmoid"]}, "objective 'sigmoid' needs scores with a bias"),
        ({"captions": {"space": 3}}, "captions are settings of a Q-Former"),
        ({"init": "closed_form"}, "init: closed_form is for visual tokens"),
        ({"objectives": ["contrastive", "sigmoid"]}, "choose one"),
        ({"objectives": ["contrastive", "answers"]}, "make two stages"),
        ({"answer_head": {"hiden": 3}}, "did you mean 'hidden'"),
    ],
)
def test_stages_that_make_no_sense_are_refused(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        helpers.run(tmp_path / "run", {"stages": [stage(**settings)]}, helpers.dual_encoder(), data())


def test_late_objectives_are_for_late_fusion(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective 'answers' is for fusion 'late', this model has 'early'; connect"):
        helpers.run(tmp_path / "run", {"stages": [stage(objectives=["answers"])]}, data=data())


@pytest.mark.parametrize("recipe", ["clip", "siglip", "late_vqa"])
def test_the_shipped_recipes_run(recipe: str, tmp_path: Path) -> None:
    model = helpers.dual_encoder(logit_bias=-10.0 if recipe == "siglip" else None)
    short = ["steps=2", "batch_size=4", "dtype=float32", "validation.samples=4"]
    result = helpers.run(tmp_path / "run", recipe, model, data(), overrides=short)
    assert chiasm.load(result.model).model.config.fusion == "late"


@pytest.mark.parametrize("recipe", ["clip", "late_vqa"])
def test_a_plan_is_shown_before_it_is_trained(recipe: str) -> None:
    model = helpers.dual_encoder()
    before = helpers.weights(model)
    stages = chiasm.api.preview(recipe, model, data(), overrides=["batch_size=4"])
    assert all(stage.seconds is not None and stage.memory.optimizer > 0 for stage in stages)
    assert model.model.config.answer_head is None and not moved(model, before)
    if recipe == "late_vqa":
        with pytest.raises(ValueError, match="takes its answers from the data; pass --data"):
            chiasm.api.preview(recipe, model)
