"""Chiasm's folders load through transformers' Auto classes, and carry a model card."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import chiasm
import chiasm.interop.auto
import tiny
from chiasm.interop.export.check import QUESTION
from chiasm.training.card import model_card

FUSIONS: dict[str, dict[str, Any]] = {
    "early": {"connector": "mlp"},
    "intermediate": {"fusion": "intermediate", "connector": tiny.connector("perceiver_resampler", project=False)},
    "unified": {"fusion": "unified", "vision": None, "image_input": {"name": "patches", "patch_size": 8}},
    "instructed": {"connector": tiny.connector("qformer", instruction=True)},
}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_folder_loads_by_itself(fusion: str, tmp_path: Path) -> None:
    options = {"vision": tiny.vision(), "language": tiny.language(), **FUSIONS[fusion]}
    vlm = chiasm.connect(**options, tokenizer=tiny.tokenizer())
    vlm.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(model) is type(vlm.model)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is type(vlm.processor)
    inputs = processor(messages=QUESTION, images=tiny.picture())
    with torch.no_grad():
        expected = vlm.model(**vlm.processor(messages=QUESTION, images=tiny.picture())).logits
        assert torch.equal(model(**inputs).logits, expected)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and f"| fusion | {vlm.model.config.fusion} |" in card
    assert type(chiasm.VLM.from_pretrained(tmp_path).model) is type(model)


def test_a_card_of_a_run_tells_its_stages(tmp_path: Path) -> None:
    from chiasm.training.card import write_card
    from chiasm.training.log import RunLog

    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("stages: []\n")
    log = RunLog(run / "log.jsonl")
    log.write("start", samples=120, held_out=6)
    log.write("plan", "align", 0, steps=9, objectives="next_token", parts={"vision": "frozen", "connector": "finetune"})
    log.write("validation", "align", 9, loss=1.25, shuffled_loss=2.5)
    log.write("stage_end", "align", 9, seconds=90.0)
    log.close()
    vlm = chiasm.connect(tiny.vision(), tiny.language(), "mlp", tokenizer=tiny.tokenizer())
    write_card(tmp_path, vlm.model, run)
    card = (tmp_path / "README.md").read_text()
    assert "samples: 120" in card and "stages: []" in card
    assert "| align | 9 | next_token | vision: frozen; connector: finetune | 1.2500, 2.5000 | 1.5 min |" in card
    assert model_card(vlm.model, [], {"visual tokens": "9"}).count("| visual tokens | 9 |") == 1


def test_pushing_uploads_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None) -> None:
            uploaded["token"] = token

        def create_repo(self, repository: str, **options: Any) -> str:
            return f"hub/{repository}"

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            uploaded["files"] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("chiasm.sources.uploading.HfApi", Hub)
    early = chiasm.connect(tiny.vision(), tiny.language(), "mlp", tokenizer=tiny.tokenizer())
    towers = chiasm.connect(tiny.vision(), tiny.language(), fusion="late", tokenizer=tiny.tokenizer())
    for model in (early, towers):
        assert model.push_to_hub("me/mine", token="secret") == "hub/me/mine"
        assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= uploaded.pop("files")


def test_a_card_tells_what_a_picture_costs(tmp_path: Path) -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language(), "mlp", tokenizer=tiny.tokenizer())
    vlm.save_pretrained(tmp_path / "mine")
    card, cost = (tmp_path / "mine/README.md").read_text(), vlm.cost()
    assert f"| visual tokens of a picture | {cost.visual_tokens} |" in card
    assert f"| KV cache of that prompt | {cost.kv_cache_bytes / 2**20:,.1f} MiB |" in card
    towers = chiasm.connect(tiny.vision(), tiny.language(), fusion="late", tokenizer=tiny.tokenizer())
    towers.save_pretrained(tmp_path / "towers")
    assert "pipeline_tag: zero-shot-image-classification" in (tmp_path / "towers/README.md").read_text()
