"""Idefics3 and SmolVLM checkpoints of transformers give the same logits and text here, in tiles too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import chiasm
import tiny
from chiasm.data.collation import require_one_size
from chiasm.interop.idefics3 import positions
from chiasm.vision.image_processor import ChiasmImageProcessor
from chiasm.vision.towers import build_tower
from contracts import (
    check_engine_equals_generate,
    check_equals_reference,
    check_saved_equals_loaded,
    check_strict_loading,
)

KINDS: dict[str, Any] = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
SIZES = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 5}
SIDE, TOKENS = 28, 4
"""Pixels, and visual tokens of a picture: blocks of 2 × 2 of its 4 × 4 patches."""


def reference(folder: Path, kind: str = "idefics3", language: str = "llama", **changes: Any) -> Any:
    """A saved model with random weights."""
    text = tiny.language(language).config
    settings: dict[str, Any] = {
        "vision_config": SIZES | {"image_size": SIDE, "patch_size": 7},
        "text_config": text.to_dict(),
        "image_token_id": 260,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    config, model = KINDS[kind]
    torch.manual_seed(5)
    found = model(config(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in [*found.model.vision_model.parameters(), *found.model.connector.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    found.save_pretrained(folder)
    return found


def siglip() -> PreTrainedModel:
    torch.manual_seed(4)
    tower = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=SIDE, patch_size=7)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def batch(counts: tuple[int, ...], tokens: int = TOKENS, mask: bool = True) -> dict[str, torch.Tensor]:
    """Rows with these numbers of tiles, and masks that leave out a part of every other."""
    pixels = torch.zeros(len(counts), max(counts), 3, SIDE, SIDE)
    seen = torch.zeros(len(counts), max(counts), SIDE, SIDE, dtype=torch.long)
    ids = torch.randint(0, 255, (len(counts), max(counts) * (tokens + 2) + 8))
    for row, count in enumerate(counts):
        for tile in range(count):
            height = SIDE - 9 * (tile % 2)
            pixels[row, tile, :, :height] = torch.randn(3, height, SIDE)
            seen[row, tile, :height] = 1
            start = 2 + tile * (tokens + 2)
            ids[row, start : start + tokens] = 260
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs | ({"pixel_attention_mask": seen} if mask else {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("language", "counts"), [("llama", (1,)), ("qwen2", (1, 3, 2))])
@pytest.mark.parametrize("mask", [True, False])
def test_logits_and_text(kind: str, language: str, counts: tuple[int, ...], mask: bool, tmp_path: Path) -> None:
    theirs = reference(tmp_path, kind, language)
    vlm, inputs = chiasm.load(tmp_path), batch(counts, mask=mask)
    check_equals_reference(vlm.model, theirs, inputs)
    check_saved_equals_loaded(vlm, inputs)


@pytest.mark.parametrize(("factor", "tokens"), [(1, 16), (4, 1)])
def test_blocks_of_other_sizes(factor: int, tokens: int, tmp_path: Path) -> None:
    theirs = reference(tmp_path, scale_factor=factor)
    check_equals_reference(chiasm.load(tmp_path).model, theirs, batch((2,), tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_strictly(kind: str, tmp_path: Path) -> None:
    reference(tmp_path, kind)
    check_strict_loading(tmp_path)


def test_patches_that_make_no_blocks_are_refused(tmp_path: Path) -> None:
    reference(tmp_path, scale_factor=3)
    with pytest.raises(ValueError, match="scale_factor=3, which does not divide its 4 patches a side"):
        chiasm.load(tmp_path)


def test_positions_are_the_references() -> None:
    assert all(positions(side) == list(range(side)) for side in (1, 4, 14, 16, 24, 26, 27, 32, 64))
    assert positions(19) != list(range(19)) and positions(31) != list(range(31))


TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MARKS = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]


def with_processor(folder: Path, splitting: bool = False, tags: bool = False) -> Idefics3Processor:
    """A saved model and processor; `tags` are tokens of their own in SmolVLM, and words in Idefics3."""
    places = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))]
    tokens = [*MARKS, *(places if tags else [])]
    reference(folder, text_config=tiny.language().config.to_dict() | {"vocab_size": 260 + len(tokens)})
    tokenizer = tiny.tokenizer(None)
    tokenizer.add_tokens(tokens, special_tokens=True)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=splitting
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=TOKENS, chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    return processor


@pytest.mark.parametrize("splitting", [False, True])
@pytest.mark.parametrize("tags", [False, True])
def test_the_processor_gives_the_same_inputs(splitting: bool, tags: bool, tmp_path: Path) -> None:
    processor = with_processor(tmp_path, splitting, tags)
    vlm = chiasm.load(tmp_path)
    pictures = [tiny.picture(1), tiny.picture(2).resize((70, 21)), tiny.picture(3).resize((11, 90))]
    texts = ["What?<image><image>Both <image> here", "<image>One"]
    inputs = {"images": [pictures, pictures[1:2]], "text": texts}
    expected = processor(**inputs, padding=True, padding_side="left", return_tensors="pt")
    found = vlm.processor(**inputs)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(images=[pictures[:2]], text=rendered, return_tensors="pt")
    found = vlm.processor(messages=messages, images=pictures[:2])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    theirs = Idefics3ForConditionalGeneration.from_pretrained(tmp_path).eval()
    tokens = theirs.generate(**expected, max_new_tokens=4, do_sample=False, suppress_tokens=[260], pad_token_id=258)
    text = processor.decode(tokens[0, expected["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert vlm.chat(pictures[:2], "What?", max_new_tokens=4) == text
    vlm.save_pretrained(tmp_path / "again")
    again = chiasm.load(tmp_path / "again").processor(messages=messages, images=pictures[:2])
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_pictures_of_other_shapes_answer_together_as_alone(tmp_path: Path) -> None:
    with_processor(tmp_path, splitting=True)
    vlm = chiasm.load(tmp_path)
    images = [[tiny.picture(1)], [tiny.picture(2).resize((90, 20)), tiny.picture(3)], []]
    asked = [tiny.ask("What is it?", len(shown)) for shown in images]
    alone = [vlm.generate([a], [i], max_new_tokens=4)[0] for a, i in zip(asked, images, strict=True)]
    assert vlm.generate(asked, images, max_new_tokens=4) == alone
    check_engine_equals_generate(vlm)


@pytest.mark.parametrize("kind", KINDS)
def test_its_cost_is_counted(kind: str, tmp_path: Path) -> None:
    reference(tmp_path, kind)
    cost = chiasm.load(tmp_path).cost()
    patches, width, inner, layers = 16, 20, 44, 3
    layer = patches * (4 * width * width + 2 * width * inner) + 2 * patches * patches * width
    assert cost.encode_flops == 2 * (patches * width * 3 * 7 * 7 + layers * layer)
    assert cost.visual_tokens == TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_its_encoder_connects_alone(kind: str) -> None:
    tower = build_tower(AutoConfig.for_model(f"{kind}_vision", **SIZES, image_size=SIDE, patch_size=7))
    vlm = chiasm.connect(tower, tiny.language(), "pixel_shuffle", tokenizer=tiny.tokenizer())
    assert vlm.model.num_image_tokens == TOKENS and isinstance(vlm.chat(tiny.picture(), "What?", max_new_tokens=2), str)


def test_training_reads_a_picture_as_one(tmp_path: Path) -> None:
    with_processor(tmp_path, splitting=True)
    vlm = chiasm.load(tmp_path)
    with pytest.raises(ValueError, match="training needs pictures of one size"):
        require_one_size(vlm.processor, (SIDE, SIDE))
    half = [0.5, 0.5, 0.5]
    vlm.processor.image_processor = ChiasmImageProcessor(SIDE, half, half, resize_mode="pad")
    vlm.processor.image_tiles = 1
    require_one_size(vlm.processor, (SIDE, SIDE))
    inputs = vlm.processor(messages=tiny.ask("What?"), images=tiny.picture(), padding_side="right")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(260) == TOKENS and ids.count(261) == 2
    assert vlm.model(**inputs, labels=inputs["input_ids"]).loss.isfinite()
