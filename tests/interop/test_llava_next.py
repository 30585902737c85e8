"""LLaVA-NeXT checkpoints of transformers give the same inputs, logits and text here, whatever the pictures' shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_llava import TEMPLATE
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import chiasm
import contracts
import tiny
from chiasm.generation.batched import BatchedDecoder
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine

IMAGE, SIDE = 260, 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
TOWERS: dict[str, Any] = {"clip": (CLIPVisionConfig, "default"), "siglip": (SiglipVisionConfig, "full")}
"""An encoder with a class token, which is left out, and one without."""
SIZES = [(40, 30), (11, 90), (61, 60), (200, 23), (900, 7), (28, 28), (37, 113)]
"""Height and width of pictures; without padding some have an odd number of rows or columns, or no column at all."""


def reference(folder: Path, tower: str = "clip", language: str = "llama", **changes: Any) -> Any:
    """A saved model with random weights; a tile has 4 × 4 patches."""
    sizes = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 5}
    kind, strategy = TOWERS[tower]
    settings: dict[str, Any] = {
        "vision_config": kind(**sizes, image_size=SIDE, patch_size=7),
        "text_config": tiny.language(language).config,
        "image_token_index": IMAGE,
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_select_strategy": strategy,
    }
    torch.manual_seed(3)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings | changes)).eval()
    model.save_pretrained(folder)
    return model


def batch(theirs: Any, sizes: list[tuple[int, int]] = SIZES, most: int = 5) -> dict[str, Tensor]:
    """A row with one picture, and a row with all others, in at most so many tiles."""
    tiles = torch.randn(len(sizes), most, 3, SIDE, SIDE)
    inputs = {"pixel_values": tiles, "image_sizes": torch.tensor(sizes)}
    with torch.no_grad():
        lengths = [len(tokens) for tokens in theirs.get_image_features(**inputs).pooler_output]
    rows = [torch.randint(0, 255, (sum(lengths) + 9,)) for _ in range(2)]
    rows[0][2 : 2 + lengths[0]] = IMAGE
    start = 1
    for length in lengths[1:]:
        rows[1][start : start + length] = IMAGE
        start += length + 1
    ids = torch.stack(rows)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", [-2, -1, [1, -2]])
def test_towers_strategies_and_layers(tower: str, layer: Any, tmp_path: Path) -> None:
    theirs = reference(tmp_path, tower, vision_feature_layer=layer)
    vlm, inputs = chiasm.load(tmp_path), batch(theirs)
    contracts.check_equals_reference(vlm.model, theirs, inputs)
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_part_dtypes_survive(vlm, inputs)


@pytest.mark.parametrize("language", ["qwen2", "gemma3"])
@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "silu")])
def test_languages_and_projectors(language: str, bias: bool, activation: str, tmp_path: Path) -> None:
    options = {"multimodal_projector_bias": bias, "projector_hidden_act": activation}
    theirs = reference(tmp_path, language=language, **options)
    contracts.check_equals_reference(chiasm.load(tmp_path).model, theirs, batch(theirs, SIZES[:3]))


@pytest.mark.parametrize(("pinpoints", "most"), [([[28, 28]], 2), ([[28, 112]], 5), ([[84, 56], [28, 56]], 7)])
def test_other_grids(pinpoints: list[list[int]], most: int, tmp_path: Path) -> None:
    theirs = reference(tmp_path, image_grid_pinpoints=pinpoints)
    contracts.check_equals_reference(chiasm.load(tmp_path).model, theirs, batch(theirs, SIZES[:4], most))


def test_text_alone_padding_and_beams(tmp_path: Path) -> None:
    theirs = reference(tmp_path)
    model, inputs = chiasm.load(tmp_path).model, batch(theirs, SIZES[:4])
    inputs["input_ids"][0, :2] = 258
    inputs["attention_mask"][0, :2] = 0
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 258, "suppress_tokens": [IMAGE]}
    one = {name: value[:1] for name, value in inputs.items()}
    assert torch.equal(model.generate(**one, **beams), theirs.generate(**one, **beams))
    contracts.check_equals_reference(model, theirs, inputs)
    contracts.check_generation_strategies(model, inputs)
    contracts.check_continues(model, inputs)
    contracts.check_image_matters(model, inputs)
    contracts.check_padding_is_ignored(model, inputs, 258)
    contracts.check_embeddings_equal_tokens(model, inputs)
    ids = torch.randint(0, 255, (2, 9))
    contracts.check_equals_reference(model, theirs, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    contracts.check_text_only_is_the_language_model(model, model.language, ids)


def test_tiles_may_stand_in_a_row(tmp_path: Path) -> None:
    """For beams too, which repeat them."""
    theirs = reference(tmp_path)
    model, inputs = chiasm.load(tmp_path).model, batch(theirs, SIZES[:3])
    counts = [model.tiling.tiles(*size) for size in SIZES[:3]]
    assert counts == [5, 4, 5]
    flat = torch.cat([tiles[:count] for tiles, count in zip(inputs["pixel_values"], counts, strict=True)])
    contracts.check_equals_reference(model, theirs, inputs | {"pixel_values": flat})
    beams = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 258}
    expected = model.generate(**inputs, **beams)
    assert torch.equal(model.generate(**inputs | {"pixel_values": flat}, **beams), expected)


def test_both_generations_of_names_load_strictly(tmp_path: Path) -> None:
    """`save_pretrained` writes those of v4.51; these are the model's own."""
    theirs = reference(tmp_path)
    contracts.check_strict_loading(tmp_path)
    names = theirs.state_dict()
    assert "model.image_newline" in names
    save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
    contracts.check_equals_reference(chiasm.load(tmp_path).model, theirs, batch(theirs))
    names.pop("model.image_newline")
    save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no value in the checkpoint: 'connector\.image_newline'"):
        chiasm.load(tmp_path)


def with_processor(folder: Path, tower: str = "clip", crop: int = SIDE, **images: Any) -> Any:
    """A saved model and its processor."""
    reference(folder, tower)
    tokenizer = tiny.tokenizer(None)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": crop, "width": crop}}
    made = LlavaNextImageProcessorPil(**{**sizes, "image_grid_pinpoints": PINPOINTS, **images})
    strategy = TOWERS[tower][1]
    told = {"vision_feature_select_strategy": strategy, "num_additional_image_tokens": int(strategy == "default")}
    processor = LlavaNextProcessor(made, tokenizer, patch_size=7, chat_template=TEMPLATE, **told)
    processor.save_pretrained(folder)
    return processor


def pictures() -> list[Any]:
    """Of every shape, the first two gray and partly transparent."""
    shown = [tiny.picture(seed).resize(size[::-1]) for seed, size in enumerate(SIZES)]
    return [shown[0].convert("L"), shown[1].convert("RGBA"), *shown[2:]]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("changes", [{}, {"size": {"height": SIDE, "width": SIDE}}, {"size": {"shortest_edge": 33}}])
def test_the_processor_gives_the_same_inputs(tower: str, changes: dict[str, Any], tmp_path: Path) -> None:
    processor = with_processor(tmp_path, tower, **changes)
    vlm = chiasm.load(tmp_path)
    texts = ["USER: <image>\nWhat? ASSISTANT:", "<image>" * (len(SIZES) - 2) + " All?", "One <image>", "None."]
    expected = processor(images=pictures(), text=texts, padding=True, padding_side="left", return_tensors="pt")
    found = vlm.processor(images=pictures(), text=texts)
    assert set(found) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"} <= set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    messages = tiny.ask("What?", 2)
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert vlm.processor.apply_chat_template(messages, add_generation_prompt=True) == rendered
    expected = processor(images=pictures()[:2], text=rendered, return_tensors="pt")
    found = vlm.processor(messages=messages, images=pictures()[:2])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    tokens = theirs.generate(**expected, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE], pad_token_id=258)
    text = processor.decode(tokens[0, expected["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert vlm.chat(pictures()[:2], "What?", max_new_tokens=4) == text
    vlm.save_pretrained(tmp_path / "again")
    again = chiasm.load(tmp_path / "again").processor(messages=messages, images=pictures()[:2])
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_a_file_is_read_upright(tmp_path: Path) -> None:
    """A picture's size, which decides on its tiles, is the one behind its EXIF orientation."""
    with_processor(tmp_path)
    vlm = chiasm.load(tmp_path)
    exif = tiny.picture().getexif()
    exif[274] = 6
    tiny.picture().resize((90, 11)).save(tmp_path / "turned.png", exif=exif)
    found = vlm.processor(messages=tiny.ask("What?"), images=[str(tmp_path / "turned.png")])
    assert found["image_sizes"].tolist() == [[90, 11]]


def test_pictures_of_other_shapes_answer_together_as_alone(tmp_path: Path) -> None:
    with_processor(tmp_path)
    vlm = chiasm.load(tmp_path)
    images = [[pictures()[1]], [pictures()[2], pictures()[3]], [], [pictures()[1], pictures()[2]]]
    asked = [tiny.ask("What is it?", len(shown)) for shown in images]
    contracts.check_batched_equals_single(vlm, asked, images)
    contracts.check_engine_equals_generate(vlm)
    alone = [vlm.generate([a], [i], max_new_tokens=4)[0] for a, i in zip(asked, images, strict=True)]
    engine = Engine(vlm.model, vlm.processor)
    assert isinstance(engine.decoder, BatchedDecoder)
    tickets = [engine.submit(a, i, Decoding(max_new_tokens=4)) for a, i in zip(asked * 2, images * 2, strict=True)]
    assert [ticket.text().strip() for ticket in tickets] == alone * 2
    assert all(ticket.cached_tokens > 0 for ticket in tickets[4:])
    stats = engine.stats()
    engine.close()
    assert tickets[3].cached_tokens > vlm.model.tiling.length(*SIZES[1]), "the same picture beside a larger one"
    assert stats.image_misses == 3


def test_what_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    theirs = reference(tmp_path)
    model, inputs = chiasm.load(tmp_path).model, batch(theirs, SIZES[:3])
    with pytest.raises(ValueError, match="pictures in tiles need image_sizes"):
        model(**{name: value for name, value in inputs.items() if name != "image_sizes"})
    with pytest.raises(ValueError, match=r"image_sizes make 3 picture\(s\) in tiles: 5 of 40×30, 4 of 11×90, 5 of"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:, :4]})
    with pytest.raises(ValueError, match=r"placeholders but 3 image\(s\) give \d+ visual tokens \(\d+ \+ \d+ \+ \d+\)"):
        model(**inputs | {"image_sizes": torch.tensor(SIZES[1:4])})
    with pytest.raises(ValueError, match=r"give .* visual tokens; build the inputs with the model's processor"):
        model.generate(**inputs | {"image_sizes": torch.tensor(SIZES[1:4])}, num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="pictures in tiles need a text"):
        model.generate(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"], max_new_tokens=2)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "all tokens of clip": (
        "clip",
        {"vision_feature_select_strategy": "full"},
        "vision_feature_select_strategy='full' of a 'clip_vision_model' encoder, which leaves no grid of patches",
    ),
    "siglip without its first patch": (
        "siglip",
        {"vision_feature_select_strategy": "default"},
        "vision_feature_select_strategy='default' of a 'siglip_vision_model' encoder",
    ),
    "pinpoint": ("clip", {"image_grid_pinpoints": [[28, 56], [30, 56]]}, r"has \[30, 56\], which tiles of 28×28"),
    "small pinpoint": ("clip", {"image_grid_pinpoints": [[0, 28]]}, r"has \[0, 28\], which tiles of 28×28"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_no_model_can_run_are_refused(name: str, tmp_path: Path) -> None:
    tower, changes, message = REFUSED[name]
    reference(tmp_path, tower)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError, match=message) as told:
        chiasm.load(tmp_path)
    assert "\n" not in str(told.value)


def test_a_processor_with_other_tiles_is_refused(tmp_path: Path) -> None:
    with_processor(tmp_path / "grids", image_grid_pinpoints=PINPOINTS[:2])
    with_processor(tmp_path / "sizes", crop=14)
    for folder in ("grids", "sizes"):
        with pytest.raises(ValueError, match=r"the model's tiles is .* but the processor's is .* load them from one"):
            chiasm.load(tmp_path / folder)
