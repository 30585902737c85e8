"""Models that come from transformers' checkpoints train by the shipped recipe, or say what to change first."""

import ast
import re
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import chiasm
import tiny
from chiasm.data.schema import ImageRef, Sample
from chiasm.training.log import read_log
from chiasm.vision.image_processor import ChiasmImageProcessor

SIZES = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 5}
TOWER = SIZES | {"image_size": 28, "patch_size": 7}
ONE_STEP = [
    f"stages.{stage}.{setting}"
    for stage in ("align", "instruct")
    for setting in ("epochs=null", "min_steps=null", "steps=1")
]


def llava() -> tuple[PreTrainedModel, Any]:
    text = tiny.language().config.to_dict() | {"vocab_size": 270}
    config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER).to_dict(), text_config=text, image_token_index=260)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaForConditionalGeneration(config), images


def llava_next() -> tuple[PreTrainedModel, Any]:
    text, pinpoints = tiny.language().config.to_dict() | {"vocab_size": 270}, [[28, 56], [56, 28], [56, 56]]
    parts = {"vision_config": CLIPVisionConfig(**TOWER).to_dict(), "text_config": text}
    config = LlavaNextConfig(**parts, image_token_index=260, image_grid_pinpoints=pinpoints)
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return LlavaNextForConditionalGeneration(config), LlavaNextImageProcessorPil(
        **sizes, image_grid_pinpoints=pinpoints
    )


def paligemma() -> tuple[PreTrainedModel, Any]:
    tower = SiglipVisionConfig(**TOWER, vision_use_head=False)
    text = SIZES | {"vocab_size": 270, "num_key_value_heads": 1, "head_dim": 6, "pad_token_id": 258}
    parts = {"vision_config": tower.to_dict(), "text_config": GemmaConfig(**text).to_dict()}
    config = PaliGemmaConfig(**parts, projection_dim=20, hidden_size=20, image_token_index=260)
    return PaliGemmaForConditionalGeneration(config), SiglipImageProcessorPil(size={"height": 28, "width": 28})


def idefics2() -> tuple[PreTrainedModel, Any]:
    text = tiny.language().config.to_dict() | {"vocab_size": 270}
    resampler = {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 6, "resampler_head_dim": 7}
    perceiver = resampler | {"hidden_size": 36, "num_key_value_heads": 2}
    config = Idefics2Config(vision_config=TOWER, text_config=text, perceiver_config=perceiver, image_token_id=260)
    return Idefics2ForConditionalGeneration(config), Idefics2ImageProcessorPil(do_image_splitting=True)


def internvl() -> tuple[PreTrainedModel, Any]:
    tower = TOWER | {"image_size": [28, 28], "patch_size": [7, 7]}
    text = tiny.language().config.to_dict() | {"vocab_size": 270}
    config = InternVLConfig(vision_config=tower, text_config=text, image_token_id=261)
    return InternVLForConditionalGeneration(config), GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})


def loaded(model: PreTrainedModel, images: Any, folder: Path) -> chiasm.VLM:
    """The model as Chiasm loads it from its files."""
    tokenizer = tiny.tokenizer(tiny.CHATML)
    tokenizer.add_tokens(["<image>", "<IMG_CONTEXT>", "<img>", "</img>"], special_tokens=True)
    for part in (model, images, tokenizer):
        part.save_pretrained(folder)
    return chiasm.load(folder)


def samples() -> list[Sample]:
    """Pictures of several sizes, up to two in a question."""
    made = helpers.samples(8)
    for index, sample in enumerate(made):
        sample.images[:] = [ImageRef.of(Image.new("RGB", (20 + 9 * index, 30))) for _ in sample.images]
    return made


def train(vlm: chiasm.VLM, folder: Path) -> dict[str, bool]:
    """One step of each stage of the shipped recipe; which parts it changed."""
    before = helpers.weights(vlm)
    result = chiasm.train("llava", vlm, samples(), folder, overrides=[*ONE_STEP, "dtype=float32"], quiet=True)
    losses = [event["loss"] for event in read_log(result.log) if event["event"] == "step"]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    after = helpers.weights(vlm)
    assert chiasm.load(result.model).chat(Image.new("RGB", (40, 30)), "colour?", max_new_tokens=2) is not None
    parts = ("vision", "connector", "language")
    return {part: any(not torch.equal(before[n], after[n]) for n in before if n.startswith(part)) for part in parts}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", [llava, llava_next, paligemma])
def test_a_loaded_model_trains_by_the_shipped_recipe(family: Any, tmp_path: Path) -> None:
    vlm = loaded(*family(), tmp_path / "theirs")
    assert train(vlm, tmp_path / "run") == {"vision": False, "connector": True, "language": True}


@pytest.mark.parametrize("family", [idefics2, internvl])
def test_a_processor_of_many_sizes_or_tiles_is_refused_with_a_fix_that_works(family: Any, tmp_path: Path) -> None:
    vlm = loaded(*family(), tmp_path / "theirs")
    recipe = {"stages": [helpers.stage(steps=1)]}
    with pytest.raises(ValueError, match=r"and save the model again$") as told:
        chiasm.train(recipe, vlm, samples(), tmp_path / "run", quiet=True)
    assert "\n" not in str(told.value)
    if call := re.search(r"vlm\.processor\.image_processor = ChiasmImageProcessor\((.*)\) of", str(told.value)):
        values = ast.literal_eval(f"({call[1].partition(', resize_mode')[0]})")
        vlm.processor.image_processor = ChiasmImageProcessor(*values, resize_mode="pad")
    vlm.processor.image_tiles = 1
    vlm.save_pretrained(tmp_path / "ours")
    result = chiasm.train(recipe, tmp_path / "ours", samples(), tmp_path / "run", quiet=True)
    assert isinstance(chiasm.load(result.model).chat(tiny.picture(), "colour?", max_new_tokens=2), str)
