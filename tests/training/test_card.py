"""A model card is for a stranger who finds it on the hub: what it says there, and examples that run."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import chiasm
import tiny
from chiasm.data.captions import CaptionProcessor
from chiasm.dual_encoder import DualEncoder
from chiasm.fusion.qformer_retrieval import build_retrieval
from chiasm.sources.cache import cache_folder
from chiasm.training.card import model_card, write_card
from chiasm.training.log import RunLog


def parts() -> dict[str, Any]:
    return {"vision": tiny.vision(), "language": tiny.language(), "tokenizer": tiny.tokenizer()}


def retrieval() -> DualEncoder:
    vlm = chiasm.connect(**parts(), connector=tiny.connector("qformer"))
    processor = CaptionProcessor(vlm.processor.image_processor, tiny.tokenizer())
    return DualEncoder(build_retrieval(vlm.model, 261, space=16), processor)


def answering() -> DualEncoder:
    towers: Any = chiasm.connect(**parts(), fusion="late")
    towers.model.add_answer_head(["a cat", "a dog"], hidden=8)
    return towers


MODELS: dict[str, Any] = {
    "early": lambda: chiasm.connect(**parts(), connector="mlp"),
    "intermediate": lambda: chiasm.connect(**parts(), fusion="intermediate"),
    "unified": lambda: chiasm.connect(
        **parts() | {"vision": None}, fusion="unified", image_input={"name": "patches", "patch_size": 8}
    ),
    "late": lambda: chiasm.connect(**parts(), fusion="late"),
    "late, with a head": answering,
    "retrieval": retrieval,
}
PIPELINES = {"late": "zero-shot-image-classification", "late, with a head": "visual-question-answering"}
PIPELINES["retrieval"] = PIPELINES["late"]


@pytest.mark.parametrize("name", MODELS)
def test_its_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    MODELS[name]().save_pretrained(tmp_path / "mine")
    tiny.picture().save(tmp_path / "picture.jpg")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "chiasm"
    assert card.data.pipeline_tag == PIPELINES.get(name, "image-text-to-text")
    monkeypatch.chdir(tmp_path)
    for example in re.findall("```python\n(.*?)```", card.text, re.DOTALL):
        assert "this/model" in example
        exec(example.replace("this/model", "mine"), {})
    assert capsys.readouterr().out.strip()


def test_a_card_of_a_run_tells_its_stages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("stages: []\n")
    log = RunLog(run / "log.jsonl")
    log.write("start", samples=120, held_out=6)
    log.write("plan", "align", 0, steps=9, objectives="next_token", parts={"vision": "frozen", "connector": "finetune"})
    answers = [
        {"correct": right, "skill": skill} for skill in ("naming", "colour") for right in (True, skill == "colour")
    ]
    log.write("validation", "align", 9, loss=1.25, shuffled_loss=2.5, answers=answers)
    log.write("stage_end", "align", 9, seconds=90.0)
    log.close()
    vlm = chiasm.connect(tiny.vision(), tiny.language(), "mlp", tokenizer=tiny.tokenizer())
    write_card(tmp_path, vlm.model, run)
    card = (tmp_path / "README.md").read_text()
    assert "samples: 120" in card and "stages: []" in card
    assert "| align | 9 | next_token | vision: frozen; connector: finetune | 1.2500, 2.5000 | 1.5 min |" in card
    assert "| all | 3 of 4 |" in card and "| naming | 1 of 2 |" in card
    results = ModelCard(card).data.eval_results
    found = {(one.metric_name, one.metric_value) for one in results}
    assert {
        ("validation loss", 1.25),
        ("validation loss with a wrong picture", 2.5),
        ("right answers, all", 0.75),
    } <= found
    told = yaml.safe_load(card.split("---")[1])["model-index"][0]
    assert told["results"][0]["task"] == {"type": "image-text-to-text"} and len(told["results"]) == 1
    assert model_card(vlm.model, [], {"visual tokens": "9"}).count("| visual tokens | 9 |") == 1


def test_a_card_tells_what_a_picture_costs(tmp_path: Path) -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language(), "mlp", tokenizer=tiny.tokenizer())
    vlm.save_pretrained(tmp_path / "mine")
    card, cost = (tmp_path / "mine/README.md").read_text(), vlm.cost()
    assert f"| visual tokens of a picture | {cost.visual_tokens} |" in card
    assert f"| KV cache of that prompt | {cost.kv_cache_bytes / 2**20:,.1f} MiB |" in card
    towers = chiasm.connect(tiny.vision(), tiny.language(), fusion="late", tokenizer=tiny.tokenizer())
    towers.save_pretrained(tmp_path / "towers")
    assert "pipeline_tag: zero-shot-image-classification" in (tmp_path / "towers/README.md").read_text()


def test_it_names_what_it_was_made_of_and_the_licences() -> None:
    """Of aliases and hub ids; of anything else a reader is told to look."""
    vlm = chiasm.connect(**parts(), connector="mlp")
    vision, language = vlm.model.config.vision_config, vlm.model.config.text_config
    vision._name_or_path, language._name_or_path = "google/siglip-tiny", str(cache_folder() / "smollm2-135m-instruct")
    data = ModelCard(card := model_card(vlm.model, [], {})).data
    assert data.base_model == ["google/siglip-tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"] and data.license is None
    assert "- google/siglip-tiny (clip_vision_model): see where it came from" in card
    assert "- smollm2-135m-instruct (llama): Apache-2.0" in card
    vision._name_or_path = str(cache_folder() / "efficientnet-lite0")
    assert ModelCard(model_card(vlm.model, [], {})).data.license == "apache-2.0"
    language._name_or_path = str(cache_folder() / "gemma3-270m")
    data = ModelCard(model_card(vlm.model, [], {})).data
    assert (data.license, data.base_model) == ("gemma", ["google/gemma-3-270m"])
    vision._name_or_path = "/somewhere/mine"
    data = ModelCard(card := model_card(vlm.model, [], {})).data
    assert data.license is None and "- mine (clip_vision_model): see" in card and "/somewhere" not in card


def test_what_it_was_made_of_is_known_after_training_too(tmp_path: Path) -> None:
    vlm = chiasm.connect(**parts(), connector="mlp")
    vlm.model.config.text_config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    vlm.save_pretrained(tmp_path / "mine")
    again = chiasm.load(tmp_path / "mine")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(ModelCard(model_card(again.model, [], {})).data.base_model)
