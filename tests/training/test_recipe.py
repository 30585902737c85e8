"""Recipes: what is read, what is refused, and that a refusal names file, line and key in one line."""

from pathlib import Path
from typing import Any

import helpers
import pytest

from chiasm.training.recipe import RecipeError, apply_overrides, load_recipe, to_yaml

TEXT = """\
batch_size: 8
stages:
  - name: align
    lr: 1e-3
    parts: {vision: frozen, connector: full, language: frozen}
  - name: instruct
    steps: 10
    batch_size: 2
    parts:
      vision: frozen
      connector: {tune: full, lr: 2e-5}
      language: {tune: lora, lr: 2e-4, rank: 8}
    validation: {every: 5}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_stages_inherit_from_the_top_and_override_it(tmp_path: Path) -> None:
    align, instruct = load_recipe(write(tmp_path, "validation: {samples: 7}\n" + TEXT)).stages
    assert (align.batch_size, instruct.batch_size) == (8, 2)
    assert (align.validation.samples, align.validation.every) == (7, None)
    assert (instruct.validation.samples, instruct.validation.every) == (7, 5)
    assert align.parts["connector"].lr == 1e-3 and align.parts["vision"].lr is None
    assert instruct.parts["language"].rank == 8 and instruct.parts["language"].targets == "all-linear"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "batch_size: 2",
            "batch_sise: 2",
            "recipe.yaml:8: stages.instruct.batch_sise: unknown key; did you mean 'batch_siz",
        ),
        ("rank: 8", "rnk: 8", "recipe.yaml:12: stages.instruct.parts.language.rnk: unknown key; did you mean 'rank'"),
        (
            "{every: 5}",
            "{each: 5}",
            "recipe.yaml:13: stages.instruct.validation.each: unknown key; known keys are",
        ),
        ("batch_size: 8", "batch_size: -1", "recipe.yaml:1: batch_size: -1: should be greater than 0"),
        ("batch_size: 8", "batch_size: yes", "recipe.yaml:1: batch_size: true is no number"),
        ("lr: 1e-3", "lr: true", "recipe.yaml:4: stages.align.lr: true is no number"),
        ("rank: 8", "rank: on", "recipe.yaml:12: stages.instruct.parts.language.rank: true is no number"),
        ("{every: 5}", "{every: on}", "recipe.yaml:13: stages.instruct.validation.every: true is no number"),
        ("steps: 10", "steps: 10\n    checkpoint_every: no", "checkpoint_every: false is no number"),
        (
            "tune: lora",
            "tune: laura",
            "recipe.yaml:12: stages.instruct.parts.language.tune: 'laura': should be",
        ),
        ("  - name: align\n", "  -\n", "stages.0.name: this key is missing"),
        ("name: instruct", "name: align", "two stages are named 'align'"),
        ("name: instruct", "name: model", "recipe.yaml:6: stages.model.name: 'model' is the name of something else"),
        ("name: instruct", "name: Log.jsonl", "'Log.jsonl' is the name of something else in a run's folder"),
        ("name: instruct", "name: ALIGN", "two stages are named 'align' and 'ALIGN', which some disks do not tell"),
        ("steps: 10", "epochs: .inf", "stages.instruct.epochs: inf: should be a finite number"),
        ("steps: 10", "steps: 10\n    lr: .inf", "lr: inf: should be a finite number"),
        ("rank: 8", "targets: []", "stages.instruct.parts.language.targets: []: "),
        ("steps: 10", "steps: 10\n    betas: [0.9, 1.0]", "stages.instruct.betas.1: 1.0: should be less than 1"),
        ("steps: 10", "steps: 10\n    betas: [-0.1, 0.9]", "betas.0: -0.1: should be greater than or equal to 0"),
        ("steps: 10", "steps: 10\n    epochs: 2", "epochs and steps contradict each other"),
        (
            "steps: 10",
            "steps: 10\n    min_steps: 2",
            "recipe.yaml:6: stages.instruct: min_steps is for epochs, not for",
        ),
        ("steps: 10", "samples: 10\n    min_steps: 2", "would not be read beside samples (10); remove one of them"),
        ("batch_size: 8", "steps: 8\nmin_steps: 2", "min_steps is for epochs, not for steps"),
        ("steps: 10", "steps: 10\n    steps: 2", "recipe.yaml:8: stages.1.steps: this key stands here twice"),
        ("vision: frozen\n", "vision: {tune: frozen, rank: 3}\n", "tune: frozen takes no 'rank'"),
        ("vision: frozen\n", "vision: {tune: full}\n", "tune: full needs an lr, here or at the stage"),
        ("vision: frozen\n", "eyes: frozen\n", "'eyes' is no part; parts are vision, connector, language"),
        ("steps: 10", "steps: 10\n    checkpoint_every: often", "'often' is neither a number of steps nor a time"),
        ("stages:", "stages: [", "recipe.yaml:"),
    ],
)
def test_a_refusal_is_one_line_with_the_place(tmp_path: Path, before: str, after: str, expected: str) -> None:
    assert before in TEXT
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, TEXT.replace(before, after, 1) if after != "stages: [" else "stages: ["))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_overrides_reach_one_stage_or_all_of_them(tmp_path: Path) -> None:
    overrides = [
        "batch_size=4",
        "stages.align.steps=3",
        "stages.instruct.parts.connector.lr=5e-5",
        "validation.samples=2",
    ]
    align, instruct = load_recipe(write(tmp_path, TEXT), overrides).stages
    assert (align.batch_size, instruct.batch_size) == (4, 4)
    assert (align.steps, align.epochs, instruct.steps) == (3, None, 10)
    assert instruct.parts["connector"].lr == 5e-5
    assert instruct.validation.samples == 2 and instruct.validation.every == 5
    again = apply_overrides(load_recipe(write(tmp_path, TEXT)), overrides)
    assert again == load_recipe(write(tmp_path, TEXT), overrides)


def test_an_override_of_the_length_replaces_any_other() -> None:
    recipe = load_recipe({"epochs": 2, "stages": [helpers.stage(steps=9)]}, ["samples=100"])
    assert (recipe.stages[0].samples, recipe.stages[0].steps, recipe.stages[0].epochs) == (100, None, None)


def test_an_override_of_the_rate_replaces_that_of_parts_and_patterns() -> None:
    norms = {"patterns": {"language.*norm*": {"tune": "full", "lr": 1e-4}}}
    recipe = {"stages": [helpers.stage(**norms), helpers.stage("instruct", parts=helpers.LORA)]}
    align, instruct = load_recipe(recipe, ["stages.align.lr=3e-3"]).stages
    assert align.parts["connector"].lr == align.patterns["language.*norm*"].lr == 3e-3
    assert instruct == load_recipe(recipe).stages[1]
    align, instruct = load_recipe(recipe, ["lr=3e-3", "stages.instruct.parts.language.lr=1e-5"]).stages
    assert align.parts["connector"].lr == instruct.parts["connector"].lr == 3e-3
    assert instruct.parts["language"].lr == 1e-5
    assert load_recipe(recipe, ["stages.instruct.parts.language.lr=1e-5", "lr=3e-3"]).stages == [align, instruct]


def test_the_fewest_steps_go_with_epochs_only() -> None:
    stages = [helpers.stage(steps=None), helpers.stage("exact"), helpers.stage("short", steps=None, epochs=0.5)]
    recipe = load_recipe({"min_steps": 30, "stages": stages})
    assert [stage.min_steps for stage in recipe.stages] == [30, None, 30]
    exact = apply_overrides(recipe, ["steps=3"])
    assert [(stage.steps, stage.min_steps) for stage in exact.stages] == [(3, None)] * 3
    with pytest.raises(RecipeError, match=r"stages\.exact: min_steps is for epochs, not for steps"):
        apply_overrides(recipe, ["stages.exact.min_steps=3"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.nowhere.steps=1", "no stage is named 'nowhere'; there are align, instruct"),
        (
            "stages.align.stepz=1",
            "override 'stages.align.stepz=1': stages.align.stepz: unknown key; did you mean",
        ),
        ("batch_size", "expected key=value"),
        ("stages.instruct.lr=.inf", "lr: inf: should be a finite number"),
        ("batch_size=many", "override 'batch_size=many': batch_size: 'many': should be a valid integer"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, TEXT), [override])
    assert expected in str(error.value)


@pytest.mark.parametrize("override", ["lr=1e-3", "steps=3", "validation.every=2", "stages.align.steps=1"])
def test_an_override_of_stages_that_are_no_mappings_is_refused(override: str) -> None:
    told = "no stage is named" if override.startswith("stages") else "stages.0: 'align': should be a valid dict"
    with pytest.raises(RecipeError, match=told):
        load_recipe({"stages": ["align"]}, [override])


def test_a_recipe_is_written_so_that_it_reads_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, TEXT))
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml").stages == recipe.stages


def test_the_length_of_a_stage_in_steps() -> None:
    def steps(**settings: float) -> int:
        settings = {"batch_size": 4, "accumulate": 2, **settings}
        return load_recipe({"stages": [{**helpers.stage(), "steps": None, **settings}]}).stages[0].num_steps(21)

    assert steps() == steps(epochs=1) == 3
    assert steps(epochs=2) == 6 and steps(epochs=0.4) == 2
    assert steps(epochs=1, min_steps=2) == 3 and steps(epochs=1, min_steps=50) == 50
    assert steps(steps=7) == 7
    assert steps(samples=17) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("? [a]\n: 1\n", "recipe.yaml:1: a key is a word"),
        ("a: &x [*x]\n", "an alias contains itself"),
        ("a: \0\n", r"recipe\.yaml: YAML allows no character #x0000; remove it$"),
    ],
)
def test_strange_yaml_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(write(tmp_path, text))


def test_own_recipes_are_found_by_name_and_others_are_listed() -> None:
    assert [stage.name for stage in load_recipe("llava").stages] == ["align", "instruct"]
    with pytest.raises(RecipeError, match=r"'lava' is neither a file nor one of Chiasm's own; did you mean llava\?"):
        load_recipe("lava")


UNREAD = [
    (
        {"pack": True, "objectives": ["contrastive"]},
        "pack is for the objective next_token, not for contrastive",
    ),
    ({"max_length": 64, "objectives": ["reconstruction"]}, "max_length is for the objective next_token, not for recon"),
    ({"captions": {"length": 8}}, "captions is for the objective contrastive or matching or grounded_generation, not"),
    ({"chunk": 8}, "chunk is for the objective contrastive or sigmoid, not for next_token; remove it"),
    ({"answer_head": {"hidden": 8}}, "answer_head is for the objective answers, not for next_token; remove it"),
    ({"betas": [0.9, 0.95], "optimizer": "sgd"}, "betas is for the optimizer adamw, not for sgd; remove it"),
]


@pytest.mark.parametrize(("settings", "told"), UNREAD)
def test_settings_that_a_stage_would_not_read_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=rf"stages\.align: {told}"):
        load_recipe({"stages": [helpers.stage(**settings)]})
    with pytest.raises(RecipeError, match=told):
        load_recipe({**settings, "stages": [helpers.stage()]})


def test_betas_at_the_top_reach_the_stages_of_adamw() -> None:
    stages = [helpers.stage("plain", optimizer="sgd"), helpers.stage("adapted")]
    plain, adapted = load_recipe({"betas": [0.8, 0.9], "stages": stages}).stages
    assert (plain.betas, adapted.betas) == ((0.9, 0.999), (0.8, 0.9))


def test_settings_at_the_top_reach_the_stages_that_read_them() -> None:
    shared = {"pack": True, "max_length": 64, "captions": {"length": 8}}
    stages = [helpers.stage("represent", objectives=["contrastive"]), helpers.stage("generate")]
    represent, generate = load_recipe({**shared, "stages": stages}).stages
    assert (represent.pack, represent.max_length, represent.captions.length) == (False, None, 8)
    assert (generate.pack, generate.max_length, generate.captions.length) == (True, 64, 32)
