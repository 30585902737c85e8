"""Plans finer than a part: from a layer on, only norms, by pattern, with every kind of LoRA; wrong ones are refused."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import chiasm
from chiasm.training.recipe import RecipeError, load_recipe
from chiasm.training.schema import Stage
from chiasm.training.stages import FreezePlan, enter

FULL = {"tune": "full", "lr": 0.1}
LORA = {"tune": "lora", "lr": 0.2, "rank": 2}
ATTENTION = "language.model.layers.*.self_attn.*"


def stage(parts: dict[str, Any], patterns: dict[str, Any] | None = None, **settings: Any) -> Stage:
    raw = {**helpers.stage(), "parts": {"*": "frozen", **parts}, "patterns": patterns or {}, **settings}
    return load_recipe({"stages": [raw]}).stages[0]


def plan_of(language: str = "llama", parts: Any = None, patterns: Any = None, vision: str = "clip") -> FreezePlan:
    return enter(helpers.vlm(language, vision).model, stage(parts or {}, patterns))


def test_from_a_layer_on() -> None:
    trained = plan_of(parts={"vision": {**FULL, "from_layer": 2}}).trainable
    assert trained and all(
        n.startswith(("vision.model.encoder.layers.2.", "vision.model.post_layernorm.")) for n in trained
    )
    trained = plan_of(vision="convnext", parts={"vision": {**FULL, "from_layer": 3}}).trainable
    assert trained and all(n.startswith(("vision.model.encoder.stages.3.", "vision.model.layernorm.")) for n in trained)
    trained = plan_of("qwen2", parts={"language": {**FULL, "from_layer": 1}}).trainable
    assert "language.model.norm.weight" in trained and "language.model.layers.1.mlp.up_proj.weight" in trained
    assert not any("layers.0." in name or "embed" in name or "lm_head" in name for name in trained)


@pytest.mark.parametrize("language", ["llama", "gpt2", "gemma3"])
def test_only_norms(language: str) -> None:
    trained = plan_of(language, parts={"language": {**FULL, "only": "norms"}}).trainable
    assert trained and all("norm" in name or ".ln_" in name for name in trained)
    late = plan_of(parts={"vision": {**FULL, "only": "norms", "from_layer": 2}}).trainable
    assert len(late) == 6


def test_patterns_win_over_their_part_and_have_rates_of_their_own() -> None:
    slow = {"tune": "full", "lr": 0.01}
    plan = plan_of(parts={"language": FULL}, patterns={ATTENTION: slow, "language.model.embed_tokens": "frozen"})
    assert plan.rates["language.model.layers.1.self_attn.q_proj.weight"] == 0.01
    assert plan.rates["language.model.layers.1.mlp.up_proj.weight"] == 0.1
    assert plan.rates["language.model.embed_tokens.weight"] is None
    rows = {row.label: row for row in plan.rows}
    assert sum(row.tensors for row in plan.rows) == len(plan.rates)
    assert rows[ATTENTION].trainable == rows[ATTENTION].parameters and rows["language"].lr == 0.1
    assert plan.states["language"].startswith("full; ") and plan.frozen_parts() == {"vision", "connector"}


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("part", ["language", "vision"])
def test_every_kind_of_lora_trains_and_is_merged(tmp_path: Path, part: str, method: str) -> None:
    parts = {"*": "frozen", part: {**LORA, "tune": method}}
    model = helpers.vlm()
    before = helpers.weights(model)
    helpers.run(tmp_path / "run", {"stages": [helpers.stage(parts=parts)]}, model)
    after = helpers.weights(chiasm.load(tmp_path / "run" / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved and all((name.startswith(part) and name.endswith("proj.weight")) or ".fc" in name for name in moved)


def test_several_adapters_in_one_part_are_saved_and_loaded(tmp_path: Path) -> None:
    vlm = helpers.vlm()
    patterns = {ATTENTION: LORA, "language.model.layers.2.mlp.*": {**LORA, "tune": "dora", "rank": 3, "lr": 0.3}}
    plan = enter(vlm.model, stage({}, patterns))
    ranks = {p.shape[0] for n, p in vlm.model.named_parameters() if "lora_A" in n}
    assert ranks == {2, 3} and {plan.rates[name] for name in plan.trainable} == {0.2, 0.3}
    assert sum("lora_A" in name for name in plan.trainable) == 3 * 4 + 3
    for name, parameter in vlm.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.1)
    vlm.save_pretrained(tmp_path)
    loaded = chiasm.load(tmp_path)
    saved, kept = helpers.weights(loaded), helpers.weights(vlm)
    assert saved.keys() == kept.keys() and all(torch.equal(saved[name], kept[name]) for name in kept)
    assert loaded.model.config.adapters == vlm.model.config.adapters


def test_lora_from_a_layer_on() -> None:
    plan = plan_of(parts={"language": {**LORA, "from_layer": 2, "targets": ["q_proj", "v_proj"]}})
    assert len(plan.trainable) == 4 and all("layers.2." in name for name in plan.trainable)


def test_a_run_with_patterns_moves_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    model = helpers.vlm()
    before = helpers.weights(model)
    recipe = {"stages": [helpers.stage(patterns={"language.model.norm": FULL})]}
    helpers.run(tmp_path / "run", recipe, model)
    after = helpers.weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if n.startswith("connector.")} | {"language.model.norm.weight"}


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"vision": {**FULL, "from_layer": 3}}, {}, "from_layer: 3 of vision: it has 3 layers, so the last one is 2"),
    ({"connector": {**FULL, "only": "norms"}}, {}, "connector has no normalisation there"),
    ({}, {"language.model.layer.*": FULL}, r"matches no parameter of this model; did you mean 'language.model.layers'"),
    ({}, {ATTENTION: FULL, "language.*.q_proj.*": LORA}, "contradicts itself: language.* is full at lr 0.1 by 'lang"),
    ({}, {"language.model.norm": LORA}, "holds none of the linear layers that targets"),
    ({}, {ATTENTION: {**LORA, "targets": ["q_proj", "qkv"]}}, r"none of the linear layers that targets \(qkv\) mean"),
    ({"connector": FULL}, {"connector.*": "frozen", "language.model.norm": FULL}, "connector: full matches nothing"),
    ({"language": {**LORA, "targets": ["qkv"]}}, {}, "'qkv' is no linear layer of part 'language'"),
    ({"cross_attention": FULL}, {}, "names the part 'cross_attention', which this model does not have"),
    ({}, {ATTENTION: "frozen"}, "trains nothing: every part is frozen"),
]


@pytest.mark.parametrize(("parts", "patterns", "expected"), WRONG)
def test_plans_that_are_wrong_are_refused(parts: dict[str, Any], patterns: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        plan_of(parts=parts, patterns=patterns)


def test_a_parameter_that_no_line_matches_is_named() -> None:
    raw = {**helpers.stage(), "parts": {"vision": "frozen", "connector": FULL}, "patterns": {ATTENTION: LORA}}
    with pytest.raises(ValueError, match=r"language, and no pattern matches language\.model\.embed_tokens\.weight"):
        enter(helpers.vlm().model, load_recipe({"stages": [raw]}).stages[0])


def test_tied_weights_cannot_be_split_by_a_pattern() -> None:
    with pytest.raises(ValueError, match=r"embed_tokens.weight and language.lm_head.weight are one tensor"):
        plan_of("qwen2", patterns={"language.lm_head": FULL})


BAD_LINES = [
    ({"vision": {"tune": "frozen", "from_layer": 3}}, {}, "a frozen part takes no from_layer"),
    ({"vision": {**LORA, "only": "norms"}}, {}, "only: norms belongs to tune: full, not to tune: lora"),
    ({"vision": {**FULL, "rank": 3}}, {}, "tune: full takes no 'rank'; only lora, dora, rslora, qlora do"),
    ({}, {"vision.*": {**FULL, "from_layer": 1}}, "from_layer is for parts; name the layers in the pattern"),
    ({}, {"vision.*": {"tune": "fulll"}}, "stages.align.patterns.vision.*.tune: 'fulll': should be"),
    ({"vision.model": FULL}, {}, "parameters by name belong under patterns"),
]


@pytest.mark.parametrize(("parts", "patterns", "expected"), BAD_LINES)
def test_lines_that_are_wrong_by_themselves(parts: dict[str, Any], patterns: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        stage(parts, patterns)
    assert expected in str(error.value) and "\n" not in str(error.value)
