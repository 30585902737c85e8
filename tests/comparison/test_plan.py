"""Plans: what is refused, with file, line and key; which combinations are cells, and why others are not."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from chiasm.comparison.choices import expand
from chiasm.comparison.compare import places
from chiasm.comparison.plan import SECTIONS, load_plan
from chiasm.comparison.quick import quickened
from chiasm.comparison.reference import SECTIONS as PAGE
from chiasm.comparison.reference import markdown
from chiasm.comparison.same_cell import identity, older_identity
from chiasm.comparison.strategies import recipe_of
from chiasm.training.recipe import RecipeError, load_recipe

LEAST: dict[str, Any] = {"data": {"train": "a", "test": "b"}, "budget": {"samples": 8}, "grid": {"connector": ["mlp"]}}


def ways(**changes: Any) -> tuple[list[str], dict[str, str]]:
    choices, skipped = expand(load_plan(LEAST | changes), lambda: (4, 4))
    return [choice.name for choice in choices], {one.way: one.reason for one in skipped}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("budgets: {samples: 8}", "5: budgets: unknown key; did you mean 'budget'?"),
        ("budget: {sample: 8}", "5: budget.sample: unknown key; did you mean 'samples'?"),
        ("budget: {samples: 8, flops: 2}", "5: budget: expected exactly one of samples, tokens, flops and minutes"),
        ("budget: {}", "found none"),
        ("budget: {samples: -1}", "5: budget.samples: -1: "),
        ("budget: {samples: 8}\nbase: {visoin: x}", "6: base.visoin: unknown key; did you mean 'vision'?"),
    ],
)
def test_a_wrong_key_is_named_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"data:\n  train: a\n  test: b\ngrid: {{}}\n{text}\n")
    with pytest.raises(RecipeError) as error:
        load_plan(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": {"connector": ["mpl"]}}, "connector 'mpl' is unknown"),
        ({"grid": {"fusion": ["middle"]}}, "fusion 'middle' is unknown"),
        ({"grid": {"tune": ["some"]}}, "tune 'some' is unknown; choose of frozen, lora, full, vision"),
        ({"grid": {"positions": ["left"]}}, "positions 'left' is unknown"),
        ({"grid": None}, "nothing to compare"),
        ({"seeds": [1, 1]}, "has one twice"),
    ],
)
def test_unknown_values_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_plan(LEAST | changes)


def test_the_plan_that_ships() -> None:
    choices, skipped = expand(load_plan("compare"), lambda: (4, 4))
    assert len(choices) == 11
    assert not skipped


def test_tokens_become_the_connectors_own_option() -> None:
    connectors = ["mlp", "avg_pool", "pixel_shuffle", "perceiver_resampler"]
    choices, skipped = expand(load_plan(LEAST | {"grid": {"connector": connectors, "tokens": [4]}}), lambda: (4, 4))
    assert [(c.label, c.connector) for c in choices if c.connector] == [
        (choice.label, choice.connector) for choice in choices
    ]
    found = {choice.label: choice.connector or {} for choice in choices}
    assert (found["avg_pool"]["output_size"], found["pixel_shuffle"]["factor"]) == (2, 2)
    assert found["perceiver_resampler"]["num_latents"] == 4
    assert [one.reason for one in skipped] == ["mlp keeps all 16 patches, so it cannot give 4 tokens"]


def test_impossible_combinations_are_skipped_with_a_reason() -> None:
    grid = {"connector": ["mlp", "qformer"], "fusion": ["early", "late", "unified"], "positions": ["auto", "mrope"]}
    names, skipped = ways(grid=grid)
    assert names == [
        *("mlp-early-seed0", "qformer-early-seed0", "mlp-late-seed0"),
        *("patches-unified-seed0", "patches-unified-mrope-seed0"),
    ]
    assert "late fusion pools a picture into one vector" in skipped["qformer-late"]
    assert "are for unified fusion" in skipped["mlp-early-mrope"]


def test_an_explicit_cell_that_is_impossible_is_an_error() -> None:
    with pytest.raises(ValueError, match="cell 'qformer-early-regions' is impossible: qformer's tokens have no places"):
        ways(cells=[{"connector": "qformer", "positions": "regions"}])


def test_regions_are_named_where_they_divide_a_cells_tokens() -> None:
    grid = {"connector": ["mlp", "avg_pool", "qformer"], "tokens": [None, 1, 9]}
    named = load_plan(LEAST | {"base": {"regions": [2, 2]}, "grid": grid})
    choices, _ = expand(named, lambda: (6, 6))
    found = {choice.way: choice.regions(named.base) for choice in choices}
    assert found == {
        "mlp-early": (2, 2),
        "avg_pool-early": None,
        "avg_pool-early-1-tokens": None,
        "avg_pool-early-9-tokens": None,
        "qformer-early": None,
        "qformer-early-1-tokens": None,
        "qformer-early-9-tokens": None,
    }
    assert ["named" in choice.to_dict() for choice in choices[:2]] == [False, True]  # older cells stay finished


def test_cells_about_regions_are_skipped_where_there_can_be_none() -> None:
    grid = {"connector": ["mlp", "avg_pool"], "positions": ["regions"]}
    choices, skipped = expand(load_plan(LEAST | {"grid": grid}), lambda: (6, 6))
    assert [choice.way for choice in choices] == ["mlp-early-regions"]
    assert [one.reason for one in skipped] == ["regions 2×2 do not divide avg_pool's tokens on a grid of 3×3"]


def test_unified_fusion_starts_from_nothing_too() -> None:
    cells = [{"fusion": "unified", "tune": "full", "weights": weights} for weights in ("pretrained", "random")]
    choices, _ = expand(load_plan(LEAST | {"grid": None, "cells": cells}), lambda: (4, 4))
    assert [choice.way for choice in choices] == ["patches-unified-full", "patches-unified-random-full"]
    assert ["weights" in choice.to_dict() for choice in choices] == [False, True]  # older cells stay finished
    with pytest.raises(ValueError, match="only unified fusion can start from random weights"):
        ways(cells=[{"weights": "random"}])
    with pytest.raises(ValueError, match="tune 'lora' leaves random weights of the language part as they are"):
        ways(cells=[{"fusion": "unified", "weights": "random"}])
    own = {"strategies": {"fast": {"language": {"tune": "full", "lr": 1e-3}}}}
    assert ways(cells=[cells[1] | {"tune": "fast"}], **own)[0][-1] == "patches-unified-random-fast-seed0"
    sizes = {"base": {"decoder": {"hidden_size": 8}}, "cells": cells[1:]}
    with pytest.raises(ValueError, match=r"base.decoder has no weights to leave out"):
        expand(load_plan(LEAST | sizes), lambda: (4, 4))


def test_two_connectors_of_one_name_want_labels() -> None:
    deep = {"name": "mlp", "depth": 3}
    with pytest.raises(ValueError, match="two cells are named 'mlp-early'"):
        ways(grid={"connector": ["mlp", deep]})
    assert ways(grid={"connector": ["mlp", deep | {"label": "mlp3"}]})[0] == ["mlp-early-seed0", "mlp3-early-seed0"]


@pytest.mark.parametrize(
    ("data", "retrieval", "said"),
    [
        ({"captions": "c"}, 50, "add data.test_captions"),
        ({"test_captions": "t"}, 50, "add data.captions"),
        ({"captions": "c", "test_captions": "t"}, 1, "evaluation.retrieval: 1: "),
        ({"test_captions": "t"}, None, "data.test_captions is read for evaluation.retrieval only"),
    ],
)
def test_retrieval_needs_captions(data: dict[str, str], retrieval: int | None, said: str) -> None:
    asked = {} if retrieval is None else {"evaluation": {"retrieval": retrieval}}
    with pytest.raises(RecipeError, match=said):
        load_plan(LEAST | {"data": LEAST["data"] | data} | asked)


def test_cells_that_were_finished_before_retrieval_stay_finished() -> None:
    plan = load_plan(LEAST)
    (choice,), _ = expand(plan, lambda: (4, 4))
    assert older_identity(plan, choice) == "10659ffa8631fb15"
    captions = {"captions": "c", "test_captions": "t"}
    first, second = (
        load_plan(LEAST | {"data": LEAST["data"] | captions, "evaluation": {"retrieval": count}}) for count in (8, 9)
    )
    assert identity(first, choice) != identity(second, choice)
    assert quickened(second).evaluation.retrieval == 8 and quickened(plan).evaluation.retrieval is None


def test_a_quick_plan_keeps_as_many_layers_as_the_plan_counts() -> None:
    top = {"top": {"language": {"tune": "full", "lr": 1e-4, "from_layer": 6}}}
    for changes, layers in (
        ({}, 4),
        ({"base": {"cross_attention": {"every": 3}}}, 4),
        ({"base": {"cross_attention": {"every": 5}}}, 5),
        ({"base": {"cross_attention": {"layers": [2, 5]}}}, 6),
        ({"strategies": top}, 7),
        ({"base": {"language_layers": 3}}, 3),
    ):
        plan = load_plan(LEAST | changes)
        quick = quickened(plan)
        assert quick.base.language_layers == layers
        whole = quick.model_dump(mode="json", exclude_unset=True)
        del whole["base"]["language_layers"]
        (choice,), _ = expand(plan, lambda: (4, 4))
        assert identity(load_plan(whole), choice) != identity(quick, choice), "the layers alone tell cells apart"


def test_late_fusion_learns_from_captions_where_they_are_asked_for_pictures() -> None:
    training = load_plan(LEAST).training.model_dump()

    def stages(fusion: str, finds: bool) -> list[str]:
        recipe = recipe_of(fusion, {}, 8, 0, True, finds=finds, solved=False, **training)
        return [stage.name for stage in load_recipe(recipe).stages]

    assert stages("late", True) == ["captions", "questions"]
    assert stages("late", False) == ["questions"]
    assert stages("early", True) == stages("early", False) == ["captions", "questions"]


def test_strategies_of_ones_own() -> None:
    own = {"top": {"language": {"tune": "full", "lr": 1e-4, "from_layer": 2}, "vision": "frozen"}}
    assert ways(strategies=own, grid={"tune": ["top"]})[0] == ["mlp-early-top-seed0"]


def test_a_connector_that_is_unknown_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("data: {train: a, test: b}\nbudget: {samples: 8}\ngrid:\n  connector:\n    - mlp\n    - mpl\n")
    with pytest.raises(RecipeError, match=r"plan.yaml:6: grid.connector.1: connector 'mpl' is unknown"):
        load_plan(path)


def test_several_plans_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "plan.yaml").write_text("not this one")
    out = Path("out")
    assert places(["compare"], out) == [("compare", out)]
    several = places(["compare", "claims"], out)
    assert several[0] == ("compare", out / "compare") and several[1][1] == out / "early_over_late"
    assert {load_plan(plan).title for plan, _ in several} >= {"Ten connectors, one language model"}
    (tmp_path / "claims").mkdir()  # the folder of an earlier run
    (tmp_path / "claims" / "plan.yaml").write_text("not this one")
    assert places(["compare", "claims"], out) == several
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(several[1][0], mine / "one.yaml")
    assert places(["mine"], out) == [("mine/one.yaml", out / "one")]
    with pytest.raises(ValueError, match=r"compare, mine/compare\.yaml, mine/one\.yaml have one name; rename"):
        shutil.copy(several[1][0], mine / "compare.yaml")
        places(["compare", "mine"], out)
    (mine / "compare.yaml").unlink()
    code, listed, _ = run("compare", "claims/gates", "mine/one.yaml", "-o", "out", "--list")
    assert code == 0 and " -o out/gates --here --only " in listed and " -o out/one --here --only " in listed
    code, _, told = run("compare", "claims", "-o", "out", "--only", "mlp-early")
    assert code == 2 and "--only names cells of one plan, and here are 9; choose one" in " ".join(told.split())


def test_the_page_of_keys_is_current_and_whole() -> None:
    page = Path(__file__).parents[2] / "docs" / "plan.md"
    assert page.read_text(encoding="utf-8") == markdown(), "chiasm recipe plan"
    models = [model for _, _, model in PAGE]
    assert {model for name, model in SECTIONS.items() if name != "strategies"} <= set(models)
    for model in models:
        silent = [name for name, field in model.model_fields.items() if not field.description]
        assert not silent, f"{model.__name__} does not say what {', '.join(silent)} are"
