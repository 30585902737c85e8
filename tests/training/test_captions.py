"""BLIP-2 in one run: a stage on captions, then one on answers, with one Q-Former and nothing lost between them."""

import shutil
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import chiasm
import tiny
from chiasm.data.captions import CaptionProcessor
from chiasm.fusion.qformer_retrieval import QFormerRetrieval
from chiasm.training.log import read_log
from chiasm.training.recipe import RecipeError, load_recipe

OBJECTIVES = ["contrastive", "matching", "grounded_generation"]
CAPTIONS = {"vision": "frozen", "connector": {"tune": "full", "lr": 1e-2}}
ANSWERS = {**CAPTIONS, "language": "frozen"}
OWN = ("image_projection", "text_projection", "matching_head", "temperature", "language_head", "words", "positions")


def vlm(**options: Any) -> chiasm.VLM:
    return helpers.vlm(connector=tiny.connector("qformer", **options))


def captions(**settings: Any) -> dict[str, Any]:
    return helpers.stage(**{"name": "represent", "parts": CAPTIONS, "objectives": OBJECTIVES, "steps": 4, **settings})


def recipe(**settings: Any) -> dict[str, Any]:
    return {"stages": [captions(**settings), helpers.stage("generate", parts=ANSWERS, steps=3)]}


def data(count: int = 20) -> list[Any]:
    return [helpers.sample(index) for index in range(count)]


def events(result: helpers.TrainResult, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_log(result.log) if event["event"] == kind]


def test_two_stages_in_one_run(tmp_path: Path) -> None:
    model = vlm()
    before = helpers.weights(model)
    checked = {"samples": 6, "every": 3}
    result = helpers.run(tmp_path / "run", recipe(validation=checked), model, data=data(40))
    first, second = (events(result, "plan")[number] for number in (0, 1))
    assert first["objectives"] == ", ".join(OBJECTIVES) and second["objectives"] == "next_token"
    assert set(first["parts"]) == {"vision", "connector"} and set(second["parts"]) == {*first["parts"], "language"}
    retrieval = QFormerRetrieval.from_pretrained(result.stages["represent"])
    assert first["trainable"] == sum(p.numel() for p in retrieval.connector.parameters())
    assert second["trainable"] == sum(p.numel() for p in model.model.connector.parameters())
    assert not events(result, "warning") or all("do not help" in e["text"] for e in events(result, "warning"))
    after = helpers.weights(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, _ in model.model.named_parameters() if name.startswith("connector.")}
    steps = [event for event in events(result, "step") if event["stage"] == "represent"]
    for event in steps:
        assert event["loss"] == pytest.approx(sum(event[f"loss_{name}"] for name in OBJECTIVES))
    assert not any(key.startswith("loss_") for event in events(result, "step")[4:] for key in event)
    validations = events(result, "validation")
    assert [(e["stage"], e["step"]) for e in validations] == [("represent", 0), ("represent", 3), ("represent", 4)]
    assert {f"shuffled_loss_{name}" for name in OBJECTIVES} < set(validations[0]) and validations[0]["answers"] == []


def test_the_second_stage_starts_from_the_first_ones_queries(tmp_path: Path) -> None:
    model = vlm()
    fresh = helpers.weights(model)
    result = helpers.run(tmp_path / "run", recipe(), model, data=data(), overrides=["keep_checkpoints=50"])
    taught = load_file(result.stages["represent"] / "model.safetensors")
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "represent-4" / "weights.safetensors")
    shared = {name for name in taught if name in fresh and name.startswith("connector.")}
    assert set(checkpoint) == shared and "connector.queries" in shared and "connector.proj.weight" not in taught
    for name in shared:
        assert torch.equal(checkpoint[name], taught[name]) and not torch.equal(taught[name], fresh[name])
    own = {name.split(".")[1] for name in taught if name.startswith("connector.")} - {n.split(".")[1] for n in shared}
    assert own == set(OWN)
    processor = CaptionProcessor.from_pretrained(result.stages["represent"])
    retrieval = QFormerRetrieval.from_pretrained(result.stages["represent"]).eval()
    inputs = processor(images=[s.images[0].load() for s in data(3)], text=["red", "green", "blue"])
    assert retrieval(**inputs).logits_per_image.shape == (3, 3)
    assert chiasm.load(result.model).model.config.connector["vocabulary"] is None


def test_learning_tells_captions_apart(tmp_path: Path) -> None:
    stage = captions(steps=80, batch_size=8, validation={"samples": 8}, captions={"space": 16})
    samples = data(48)
    result = helpers.run(tmp_path / "run", {"stages": [stage]}, vlm(), data=samples[8:], validation_samples=samples[:8])
    first, last = events(result, "validation")
    for name in OBJECTIVES:
        assert last[f"loss_{name}"] < first[f"loss_{name}"]
        assert last[f"loss_{name}"] < last[f"shuffled_loss_{name}"]


@pytest.mark.parametrize("dies_at", [3, 5, 7])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, dies_at: int) -> None:
    settings = recipe(accumulate=2, checkpoint_every=1)
    whole, resumed = helpers.whole_and_resumed(tmp_path, settings, lambda: vlm(dropout=0.1), data(), dies_at)
    one, other = (load_file(run.stages["represent"] / "model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_later_caption_stage_goes_on_with_text_branch_and_heads(tmp_path: Path) -> None:
    first = captions(objectives=["contrastive"], steps=2)
    second = captions(name="more", steps=1, parts={**CAPTIONS, "connector": {"tune": "full", "lr": 1e-9}})
    result = helpers.run(tmp_path / "run", {"stages": [first, second]}, vlm(), data=data())
    one, other = (load_file(result.stages[name] / "model.safetensors") for name in ("represent", "more"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
    untouched = [event["text"] for event in events(result, "warning")]
    assert any("got no gradient" in text for text in untouched)


def test_samples_without_exactly_one_picture_are_left_out_aloud(tmp_path: Path) -> None:
    result = helpers.run(
        tmp_path / "run", {"stages": [captions(steps=None, epochs=1)]}, vlm(), data=helpers.samples(20)
    )
    odd = sum(len(sample.images) != 1 for sample in helpers.samples(20))
    assert sum(event["samples"] for event in events(result, "step")) == 20 - odd
    assert f"{odd} samples do not have exactly one picture" in events(result, "warning")[0]["text"]
    with pytest.raises(ValueError, match="'represent' reads captions of one picture each, and the data has no such"):
        helpers.run(tmp_path / "other", {"stages": [captions()]}, vlm(), data=[helpers.sample(0, images=2)] * 3)


def test_words_of_a_bert_shaped_encoder(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    words = tiny.tokenizer(None)
    words.add_tokens(["red"])
    words.save_pretrained(tmp_path / "bert")
    start = {"init_from": str(tmp_path / "bert"), "length": 8, "space": 10}
    stage = captions(steps=1, captions=start, parts={**CAPTIONS, "connector": {"tune": "full", "lr": 1e-9}})
    result = helpers.run(tmp_path / "run", {"stages": [stage]}, vlm(), data=data(8))
    made = QFormerRetrieval.from_pretrained(result.stages["represent"])
    table = BertModel.from_pretrained(tmp_path / "bert").embeddings.word_embeddings.weight
    torch.testing.assert_close(made.connector.words.weight, table[: len(words)], rtol=0, atol=1e-6)
    assert len(CaptionProcessor.from_pretrained(result.stages["represent"]).encode("red")) == 3


def test_the_recipe_of_the_paper_runs(tmp_path: Path) -> None:
    recipe = load_recipe("blip2")
    assert [stage.objectives for stage in recipe.stages] == [OBJECTIVES, ["next_token"]]
    short = ["steps=2", "batch_size=4", "dtype=float32", "validation.samples=4"]
    result = helpers.run(tmp_path / "run", "blip2", vlm(), data=data(), overrides=short)
    assert set(result.stages) == {"representation", "generative"}
    stages = [(event["stage"], event["step"]) for event in events(result, "validation")]
    assert stages == [("representation", 0), ("representation", 2), ("generative", 0), ("generative", 2)]


def test_the_first_stage_alone_leaves_a_model_that_answers_too(tmp_path: Path) -> None:
    """Its Q-Former is the trained one; a run that is killed before it is written, writes it."""
    result = helpers.run(tmp_path / "run", {"stages": [captions()]}, vlm(), data=data())
    first = chiasm.load(result.model).model
    taught = QFormerRetrieval.from_pretrained(result.stages["represent"]).connector.state_dict()
    own = first.connector.state_dict()
    assert "queries" in taught and all(torch.equal(taught[name], own[name]) for name in taught.keys() & own.keys())
    assert first.config.fresh_connector
    shutil.rmtree(result.model)
    again = chiasm.load(helpers.run(tmp_path / "run", {"stages": [captions()]}, vlm(), data=data()).model).model
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    chiasm.train(load_recipe({"stages": [captions(steps=1)]}), result.model, data(), tmp_path / "more", quiet=True)


@pytest.mark.parametrize("dies_at", [5, 7])
def test_what_the_first_stage_taught_is_put_in_words_by_the_second(tmp_path: Path, dies_at: int) -> None:
    """`init: auto` is for a connector that has not spoken to the language model yet, resumed or not."""
    spoken = [helpers.stage(name, parts=ANSWERS, steps=2, init="auto", checkpoint_every=1) for name in ("say", "again")]
    stages = {"stages": [captions(), *spoken]}
    whole, resumed = helpers.whole_and_resumed(tmp_path, stages, vlm, data(), dies_at)
    for result in (whole, resumed):
        assert {event["stage"] for event in events(result, "closed_form")} == {"say"}
        assert chiasm.load(result.model).model.config.fresh_connector is False


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"objectives": ["next_tokn"]}, "'next_tokn' is no objective; choose of next_token, contrastive, matching"),
        ({"objectives": []}, "objectives"),
        ({"objectives": ["next_token", "matching"]}, "make two stages"),
        ({"objectives": ["matching", "matching"]}, "an objective stands here twice"),
        ({"objectives": ["matching"], "batch_size": 1}, "batch_size must be 2 or more"),
        ({"objective": "next_token"}, "did you mean 'objectives'"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe({"stages": [{**captions(), **change}]})


def test_other_connectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model has the connector 'mlp'; connect one with fusion='late' or"):
        helpers.run(tmp_path / "run", {"stages": [captions()]}, data=data())
