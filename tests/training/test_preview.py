"""The preview of a run: counts, memory and time before the first step, on a model that stays as it is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from rich.console import Console

import chiasm.api
from chiasm.data.schema import ImageRef
from chiasm.training.log import read_log
from chiasm.training.preview import preview, print_preview
from chiasm.training.recipe import apply_overrides, load_recipe
from chiasm.training.reporter import plan_table, short

DORA = {"*": "frozen", "language": {"tune": "dora", "lr": 0.1, "rank": 2}}
RECIPE = load_recipe({"stages": [helpers.stage(), helpers.stage("second", parts=DORA, batch_size=8, steps=6)]})


def test_counts_memory_and_time() -> None:
    vlm = helpers.vlm()
    before, names = helpers.weights(vlm), [n for n, _ in vlm.model.named_parameters()]
    first, second = preview(RECIPE, vlm.model, vlm.processor, helpers.samples(40))
    trained = sum(p.numel() for p in vlm.model.connector.parameters())
    assert first.memory.gradients == 4 * trained and first.memory.optimizer == 8 * trained
    assert first.memory.weights == 4 * sum(p.numel() for p in vlm.model.parameters()) and first.memory.copies == 0
    assert second.memory.activations > first.memory.activations > 0
    assert (second.steps, second.samples) == (6, 48) and second.seconds > 0
    after = helpers.weights(vlm)
    assert [n for n, _ in vlm.model.named_parameters()] == names and vlm.model.config.adapters is None
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads(json.dumps(second.fields()))["memory"]["total"] == second.memory.total


def test_without_data_there_is_no_time_but_bfloat16_has_copies() -> None:
    vlm = helpers.vlm()
    stage = preview(load_recipe({"stages": [helpers.stage(dtype="bfloat16")]}), vlm.model, vlm.processor)[0]
    assert stage.seconds is None and stage.memory.activations is None
    assert stage.memory.copies == 2 * sum(p.numel() for p in vlm.model.language.parameters())
    console = Console(record=True, width=120)
    print_preview([stage], console)
    text = console.export_text()
    assert "connector" in text and "pass --data" in text


@pytest.mark.parametrize("tune", [{"tune": "lora", "rank": 16}, {"tune": "full", "from_layer": 1, "only": "norms"}])
def test_numbers_are_whole_in_a_narrow_table(tune: dict[str, Any]) -> None:
    pattern = "language.model.layers.*.post_attention_layernorm.*"
    parts = {"*": "frozen", "connector": {"tune": "full", "lr": 1.25e-5}, "vision": {**tune, "lr": 2.5e-5}}
    settings = {"parts": parts, "patterns": {pattern: {"tune": "full", "lr": 3.75e-6}}}
    vlm, console = helpers.vlm(), Console(record=True, width=80)
    shown = preview(load_recipe({"stages": [helpers.stage(**settings)]}), vlm.model, vlm.processor)
    console.print(plan_table(shown[0].plan))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for row in shown[0].plan.rows:
        numbers = f"{row.trainable_tensors}/{row.tensors}", f"{short(row.trainable)}/{short(row.parameters)}"
        assert all(number in text.split() for number in (*numbers, f"{row.share:.1%}"))
    assert all(rate in text.split() for rate in ("1.25e-05", "2.5e-05", "3.75e-06"))


def test_activations_are_what_autograd_keeps() -> None:
    vlm = helpers.vlm()
    kept = []
    for size in (4, 8):
        recipe = load_recipe({"stages": [helpers.stage(batch_size=size)]})
        data = [helpers.sample(0) for _ in range(16)]
        kept.append(preview(recipe, vlm.model, vlm.processor, data)[0].memory.activations)
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.1)


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    vlm, kept = helpers.vlm(), []
    parts = {"*": "frozen", "language": {"tune": "full", "lr": 0.1}}
    for checkpointed in (False, True):
        recipe = load_recipe({"stages": [helpers.stage(parts=parts, gradient_checkpointing=checkpointed)]})
        kept.append(preview(recipe, vlm.model, vlm.processor, helpers.samples(16))[0].memory.activations)
    assert kept[1] < 0.5 * kept[0]


def test_the_steps_are_those_that_training_takes(tmp_path: Path) -> None:
    """Held-out samples, samples of another kind, and unusable ones are not counted."""
    data = [helpers.sample(index) for index in range(40)]
    data += [replace(helpers.sample(0), id="rotten", images=[ImageRef.of(b"no picture", "rotten.png")])]
    data += [replace(helpers.sample(0), id="mute", messages=helpers.sample(0).messages[:1])] * 8
    settings = {"data": "questions", "skip_bad": True, "validation": {"samples": 4}, "batch_size": 1, "steps": None}
    recipe = load_recipe({"stages": [helpers.stage(**settings)], "forgetting": helpers.FORGETTING_OFF})
    vlm = helpers.vlm()
    shown = preview(recipe, vlm.model, vlm.processor, data)[0]
    log = read_log(helpers.run(tmp_path / "run", recipe, vlm, data).log)
    assert shown.steps == next(event["steps"] for event in log if event["event"] == "plan") < 40
    held_out = helpers.samples(4)
    whole = chiasm.api.preview(recipe, vlm, data, validation_data=held_out, quiet=True)[0]
    log = read_log(helpers.run(tmp_path / "whole", recipe, vlm, data, validation_samples=held_out).log)
    assert whole.steps == next(event["steps"] for event in log if event["event"] == "plan") > shown.steps
    with pytest.raises(ValueError, match=r"sample 'mute': .*; chiasm data check lists every such sample"):
        preview(apply_overrides(recipe, ["skip_bad=false"]), vlm.model, vlm.processor, data)


def test_the_disk_is_told_before_it_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, data = helpers.vlm(), [helpers.sample(index) for index in range(40)]
    recipe = load_recipe({"stages": [helpers.stage(steps=None, epochs=2, validation={"samples": 0})]})
    cached = preview(recipe, vlm.model, vlm.processor, data)[0]
    row = 4 * vlm.model.vision.num_patches * vlm.model.vision.width
    assert cached.features == 40 * row == cached.fields()["features"]
    console = Console(record=True, width=120)
    monkeypatch.setattr("chiasm.training.preview.free_space", lambda: 1000)
    print_preview([cached], console)
    assert "0.0 MB are free; where they do not fit, every epoch encodes anew" in " ".join(console.export_text().split())
    uncached = preview(apply_overrides(recipe, ["cache_features=false"]), vlm.model, vlm.processor, data)[0]
    assert uncached.features == 0


def test_a_preview_of_nothing_but_broken_pictures_is_refused() -> None:
    data = [replace(helpers.sample(i), images=[ImageRef.of(b"no picture", "rotten.png")]) for i in range(9)]
    recipe, vlm = load_recipe({"stages": [helpers.stage(skip_bad=True)]}), helpers.vlm()
    with pytest.raises(ValueError, match="none of the 9 samples that were tried can be used; chiasm data check"):
        preview(recipe, vlm.model, vlm.processor, data)


VISION = {"*": "frozen", "vision": {"tune": "full", "lr": 0.1}}
UNFIT = [
    ({"patterns": {"language.layer": "frozen"}}, "'late': pattern 'language.layer' matches no parameter"),
    (
        {"parts": {"*": "frozen"}, "patterns": {"vision.model.post_layernorm": {"tune": "full", "lr": 1e-3}}},
        r"'late': the loss depends on none of the weights that the plan trains \(vision\.model\.post_layernorm\.",
    ),
    ({"gates": "open"}, "'late': gates: open is for models with the part cross_attention"),
    ({"parts": VISION, "cache_features": True}, "'late' tunes the vision part, so its features cannot be cached"),
    ({"parts": VISION, "init": "closed_form"}, "'late': init: closed_form changes the part connector, which is frozen"),
    ({"parts": {"*": "frozen", "language": {"tune": "qlora", "lr": 0.1}}}, "'late': tune: qlora needs the package"),
    ({"pack": True}, "'late': a llama language model does not keep packed samples apart"),
    ({"compile": True}, "compile: true needs a C\\+\\+ compiler"),
]


@pytest.fixture
def poor_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bitsandbytes, no compiler, and a language model that mixes packed samples."""
    monkeypatch.setattr("chiasm.training.four_bit.find_spec", lambda name: None)
    monkeypatch.setattr("chiasm.training.compiling.can_compile", lambda device: False)
    monkeypatch.setattr("chiasm.training.stage_model.torch.allclose", lambda *_, **__: False)


@pytest.mark.usefixtures("poor_machine")
@pytest.mark.parametrize(("settings", "told"), [*UNFIT, ({"data": "captions"}, "'late' reads captions, and the data")])
def test_a_late_stage_that_does_not_fit_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], told: str
) -> None:
    """By training, which has written nothing yet, as by the preview, which has measured nothing yet."""
    recipe, vlm = load_recipe({"stages": [helpers.stage(), helpers.stage("late", **settings)]}), helpers.vlm()
    before = helpers.weights(vlm)
    with pytest.raises(ValueError, match=told) as refused:
        helpers.run(tmp_path / "run", recipe, vlm)
    assert not (tmp_path / "run").exists() and "\n" not in str(refused.value)
    monkeypatch.setattr("chiasm.training.preview.measure", lambda *_: pytest.fail("a stage was measured"))
    with pytest.raises(ValueError, match=told):
        preview(recipe, vlm.model, vlm.processor, helpers.samples())
    after = helpers.weights(vlm)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("poor_machine")
@pytest.mark.parametrize(("settings", "told"), UNFIT)
def test_without_data_a_stage_that_does_not_fit_is_refused_too(settings: dict[str, Any], told: str) -> None:
    recipe, vlm = load_recipe({"stages": [helpers.stage(), helpers.stage("late", **settings)]}), helpers.vlm()
    with pytest.raises(ValueError, match=told):
        preview(recipe, vlm.model, vlm.processor)
