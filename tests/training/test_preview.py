"""The preview of a run: counts, memory and time before the first step, on a model that stays as it is."""

import json

import helpers
import pytest
import torch
from rich.console import Console

from chiasm.training.preview import preview, print_preview
from chiasm.training.recipe import load_recipe

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


def test_activations_are_what_autograd_keeps() -> None:
    vlm = helpers.vlm()
    kept = []
    for size in (4, 8):
        recipe = load_recipe({"stages": [helpers.stage(batch_size=size)]})
        data = [helpers.sample(0) for _ in range(16)]
        kept.append(preview(recipe, vlm.model, vlm.processor, data)[0].memory.activations)
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.1)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    vlm = helpers.vlm()
    recipe = load_recipe({"stages": [helpers.stage(patterns={"language.layer": "frozen"})]})
    with pytest.raises(ValueError, match="matches no parameter"):
        preview(recipe, vlm.model, vlm.processor)
