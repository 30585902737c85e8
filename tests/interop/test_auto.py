"""Chiasm's folders load through transformers' Auto classes, and carry a model card."""

from pathlib import Path
from typing import Any

import pytest
import test_unified_loaders
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import chiasm
import chiasm.interop.auto
import tiny
from chiasm.interop.export.check import QUESTION

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


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_auto_class_gives_what_it_is_for(fusion: str, tmp_path: Path) -> None:
    options = {"vision": tiny.vision(), "language": tiny.language(), **FUSIONS[fusion]}
    vlm = chiasm.connect(**options, tokenizer=tiny.tokenizer())
    vlm.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(vlm.model.config) and config.fusion == vlm.model.config.fusion
    for auto in (AutoModel, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(tmp_path)) is type(auto.from_config(config)) is type(vlm.model)
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*ChiasmConfig.*AutoModelForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words.get_vocab() == vlm.processor.tokenizer.get_vocab()
    said = [{"role": "user", "content": "Hi"}]
    assert words.apply_chat_template(said, tokenize=False) == vlm.processor.apply_chat_template(said)
    images = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(images) is type(vlm.processor.image_processor)
    assert images.to_dict() == vlm.processor.image_processor.to_dict()


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_pipeline_answers_a_batch_as_chat_does(language: str, tmp_path: Path) -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language(language), "mlp", tokenizer=tiny.tokenizer())
    vlm.save_pretrained(tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    asked = [(tiny.picture(1), "What?"), (tiny.picture(2), "Is it another one of those, or what?")]
    said = [
        [{"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": words}]}]
        for shown, words in asked
    ]
    told = ask(text=said, batch_size=2, max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False})
    expected = [vlm.chat(shown, words, max_new_tokens=5) for shown, words in asked]
    assert [one[0]["generated_text"].strip() for one in told] == expected


def test_a_model_that_came_from_qwen2_vl_loads_by_itself(tmp_path: Path) -> None:
    test_unified_loaders.qwen2_vl_with_processor(tmp_path / "first")
    vlm: Any = chiasm.load(tmp_path / "first")
    vlm.save_pretrained(tmp_path / "mine")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "mine").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "mine")
    assert type(model) is type(vlm.model) and type(processor) is type(vlm.processor)
    inputs = processor(messages=QUESTION, images=tiny.picture())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, vlm.model(**inputs).logits)


def test_a_whole_model_is_no_encoder_and_no_language_model(tmp_path: Path) -> None:
    """Though AutoModel knows it."""
    chiasm.connect(tiny.vision(), tiny.language(), "mlp", tokenizer=tiny.tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a chiasm model is no vision encoder here: it is a whole image-text model"):
        chiasm.connect(str(tmp_path), tiny.language(), "mlp", tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match="holds a model of type 'chiasm', which is no language model"):
        chiasm.connect(tiny.vision(), str(tmp_path), "mlp")


def test_pushing_uploads_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None) -> None:
            uploaded["token"] = token

        def create_repo(self, repository: str, **options: Any) -> str:
            return f"hub/{repository}"

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            uploaded["files"] = {path.name for path in Path(folder_path).iterdir()}
            uploaded["card"] = Path(folder_path, "README.md").read_text()

    monkeypatch.setattr("chiasm.sources.uploading.HfApi", Hub)
    early = chiasm.connect(tiny.vision(), tiny.language(), "mlp", tokenizer=tiny.tokenizer())
    towers = chiasm.connect(tiny.vision(), tiny.language(), fusion="late", tokenizer=tiny.tokenizer())
    for model in (early, towers):
        assert model.push_to_hub("me/mine", token="secret") == "hub/me/mine"
        assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= uploaded.pop("files")
        assert uploaded["card"].count('"me/mine"') == 3 and "this/model" not in uploaded["card"]
