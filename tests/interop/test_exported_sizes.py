"""An encoder that was connected with another picture size is written with positions for that size."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import test_clip
import test_convert
import test_idefics3
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import chiasm
import tiny
from chiasm.interop.convert import convert
from chiasm.interop.export.check import QUESTION
from chiasm.vision.encoder import load_vision
from chiasm.vision.resampling import at_own_size


def shaken(tower: PreTrainedModel) -> PreTrainedModel:
    """With positions that matter."""
    for parameter in tower.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return tower


def larger(vlm: chiasm.VLM, side: int) -> chiasm.VLM:
    """The same model on pictures of another size, as if it had been connected so."""
    before = vlm.model
    wanted = {"layers": [layer.layer for layer in before.vision.features.layers]}
    wanted["prefix"] = before.vision.features.prefix
    vision = load_vision(shaken(before.vision.model), wanted, image_size=side)
    config = copy.deepcopy(before.config)
    config.features = vision.features.to_dict()
    made = type(before)(config, vision=vision, language=before.language).eval()
    made.load_state_dict(before.state_dict())
    return chiasm.VLM(made, None)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_llava(vision: str, tmp_path: Path) -> None:
    tower = shaken(tiny.vision(vision))
    read = {"layers": [-2], "prefix": "keep" if vision == "dinov2" else "drop"}
    made = {"tokenizer": tiny.tokenizer(), "image_size": 50, "features": read}
    vlm = chiasm.connect(tower, tiny.language(), "mlp", **made)
    assert vlm.model.num_image_tokens == 25 + (vision == "dinov2")
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path)
    assert done.kind == "llava" and done.difference is not None and done.difference < 1e-4
    told = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    assert told["image_size"] in (50, [50, 50])
    assert vlm.model.vision.features.image_size == (50, 50) and tower.config.image_size == 30, "it is as it was"
    theirs, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    asked = [QUESTION[0] | {"content": [{"type": "image", "image": tiny.picture()}, *QUESTION[0]["content"][1:]]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(asked, **options)
    tokens = theirs.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = vlm.chat(tiny.picture(), "What is it?", max_new_tokens=5)
    assert processor.decode(tokens, skip_special_tokens=True).strip() == text
    assert chiasm.load(tmp_path).chat(tiny.picture(), "What is it?", max_new_tokens=5) == text


LOADED: dict[str, int] = {
    "blip2": 50,
    "instructblip": 20,
    "idefics": 50,
    "idefics patches": 40,
    "internvl": 32,
    "paligemma": 50,
}


@pytest.mark.parametrize("name", LOADED)
def test_kinds_with_a_loader_of_their_own(name: str, tmp_path: Path) -> None:
    test_convert.REFERENCES[name](tmp_path / "first")
    vlm = larger(chiasm.load(tmp_path / "first"), LOADED[name])
    done = convert(vlm.model, None, "transformers", tmp_path / "out")
    assert done.difference is not None and done.difference < 1e-4
    assert chiasm.load(tmp_path / "out").model.vision.image_size == (LOADED[name],) * 2


def test_pixel_shuffle(tmp_path: Path) -> None:
    shuffle = {"name": "pixel_shuffle", "projection": "linear", "factor": 2}
    vlm = chiasm.connect(test_idefics3.siglip(), tiny.language(), shuffle, tokenizer=tiny.tokenizer(), image_size=42)
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path)
    assert done.kind == "idefics3" and done.difference is not None and done.difference < 1e-4


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_towers(kind: str, tmp_path: Path) -> None:
    test_clip.make(kind, tmp_path / "first")
    vlm = larger(chiasm.load(tmp_path / "first"), 49)
    done = convert(vlm.model, None, "transformers", tmp_path / "out")
    assert done.difference is not None and done.difference < 1e-4
    assert chiasm.load(tmp_path / "out").model.vision.image_size == (49, 49)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_features_are_the_same_bit_for_bit(vision: str, dtype: torch.dtype) -> None:
    encoder = load_vision(shaken(tiny.vision(vision)).to(dtype), image_size=50)
    own = at_own_size(encoder)
    pixels = torch.randn(2, 3, 50, 50).to(dtype)
    with torch.no_grad():
        assert torch.equal(own(pixels), encoder(pixels)) and own.model.dtype == dtype
    assert own is not encoder and at_own_size(own) is own and not own.features.interpolate_positions
    same = load_vision(tiny.vision(vision))
    assert at_own_size(same) is same


def test_positions_for_squares_alone_refuse_another_shape(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "image_size": (50, 30), "resize_mode": "squash"}
    vlm = chiasm.connect(tiny.vision("siglip"), tiny.language(), "mlp", **options)
    for target, why in (("transformers", "LLaVA cannot read the features"), ("gguf", "of a square picture")):
        with pytest.raises(ValueError, match=f"{why}.* and a square image_size"):
            convert(vlm.model, vlm.processor, target, tmp_path / "out")
