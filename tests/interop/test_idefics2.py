"""A transformers Idefics2 checkpoint gives the same logits and text here, for pictures of any size and number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

import chiasm
import tiny
from chiasm.vision.towers import build_tower
from contracts import (
    check_engine_equals_generate,
    check_equals_reference,
    check_saved_equals_loaded,
    check_strict_loading,
)

LATENTS = 5


def reference(folder: Path, language: str = "llama", **changes: Any) -> Idefics2ForConditionalGeneration:
    sizes = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 5}
    text = tiny.language(language).config
    perceiver = {
        "hidden_size": text.hidden_size,
        "resampler_n_latents": LATENTS,
        "resampler_depth": 2,
        "resampler_n_heads": 6,
        "resampler_head_dim": 7,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-3,
    }
    settings: dict[str, Any] = {
        "vision_config": sizes | {"image_size": 35, "patch_size": 7},
        "text_config": text.to_dict(),
        "perceiver_config": perceiver,
        "image_token_id": 260,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    torch.manual_seed(5)
    idefics2 = Idefics2ForConditionalGeneration(Idefics2Config(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in idefics2.model.connector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    idefics2.save_pretrained(folder)
    return idefics2


def batch(counts: tuple[int, ...], size: tuple[int, int] = (35, 28), mask: bool = True) -> dict[str, torch.Tensor]:
    """Rows with these numbers of pictures; every picture has its own size and is padded to the largest."""
    pixels = torch.zeros(len(counts), max(counts), 3, *size)
    seen = torch.zeros(len(counts), max(counts), *size, dtype=torch.long)
    ids = torch.randint(0, 255, (len(counts), max(counts) * (LATENTS + 2) + 8))
    for row, count in enumerate(counts):
        for picture in range(count):
            height, width = size[0] - 3 * (row + picture), size[1] - 2 * picture
            pixels[row, picture, :, :height, :width] = torch.randn(3, height, width)
            seen[row, picture, :height, :width] = 1
            start = 2 + picture * (LATENTS + 2)
            ids[row, start : start + LATENTS] = 260
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs | ({"pixel_attention_mask": seen} if mask else {})


@pytest.mark.parametrize("language", ["llama", "qwen2"])
@pytest.mark.parametrize("counts", [(1,), (2, 1), (1, 3, 2)])
@pytest.mark.parametrize("mask", [True, False])
def test_numbers_and_sizes_of_pictures(language: str, counts: tuple[int, ...], mask: bool, tmp_path: Path) -> None:
    idefics2 = reference(tmp_path, language)
    vlm, inputs = chiasm.load(tmp_path), batch(counts, mask=mask)
    check_equals_reference(vlm.model, idefics2, inputs)
    check_saved_equals_loaded(vlm, inputs)


@pytest.mark.parametrize("size", [(35, 35), (14, 63), (50, 23)])
def test_pictures_of_other_proportions(size: tuple[int, int], tmp_path: Path) -> None:
    idefics2 = reference(tmp_path)
    model = chiasm.load(tmp_path).model
    for mask in (True, False):
        check_equals_reference(model, idefics2, batch((2,), size, mask))


def test_weights_are_read_strictly(tmp_path: Path) -> None:
    reference(tmp_path)
    check_strict_loading(tmp_path)


TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def with_processor(folder: Path, splitting: bool = False) -> Idefics2Processor:
    text = tiny.language().config.to_dict() | {"vocab_size": 263}
    reference(folder, text_config=text)
    tokenizer = tiny.tokenizer(None)
    tokenizer.add_tokens(["<image>", "<fake_token_around_image>", "<end_of_utterance>"], special_tokens=True)
    images = Idefics2ImageProcessorPil(
        size={"shortest_edge": 20, "longest_edge": 33}, do_image_splitting=splitting, do_convert_rgb=True
    )
    processor = Idefics2Processor(images, tokenizer, image_seq_len=LATENTS, chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    return processor


@pytest.mark.parametrize("splitting", [False, True])
def test_the_processor_gives_the_same_inputs(splitting: bool, tmp_path: Path) -> None:
    processor = with_processor(tmp_path, splitting)
    vlm = chiasm.load(tmp_path)
    pictures = [tiny.picture(1), tiny.picture(2).resize((70, 21)), tiny.picture(3)]
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
    assert isinstance(vlm.chat(pictures[:2], "What?", max_new_tokens=3), str)
    answers = vlm.generate([messages, tiny.ask("No?", 0)], [pictures[:2], []], max_new_tokens=3)
    assert answers[0] == vlm.generate([messages], [pictures[:2]], max_new_tokens=3)[0]
    check_engine_equals_generate(vlm)
    vlm.save_pretrained(tmp_path / "again")
    again = chiasm.load(tmp_path / "again").processor(messages=messages, images=pictures[:2])
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_answers_are_supervised_and_the_padding_of_a_row_is_ignored(tmp_path: Path) -> None:
    idefics2 = reference(tmp_path)
    model, inputs = chiasm.load(tmp_path).model, batch((2, 1))
    alone = {name: value[1:] for name, value in inputs.items()}
    with torch.no_grad():
        together = model(**inputs).logits[1:]
        torch.testing.assert_close(model(**alone).logits, together, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(idefics2(**alone).logits, together, rtol=1e-4, atol=1e-4)
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 258, "suppress_tokens": [260]}
    assert torch.equal(model.generate(**inputs, **beams), idefics2.generate(**inputs, **beams))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"hidden_act": "gelu"}}, r"text_config\.hidden_act is 'gelu'"),
        ({"perceiver_config": {"resampler_depth": 3}}, r"10 weights have no value .* 'connector\.layers\.2"),
        (
            {"perceiver_config": {"resampler_n_latents": 4}},
            r"latents' is \(5, 36\), but 'connector\.latents' is \(4, 36\)",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name, values in change.items():
        settings[name] |= values
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        chiasm.load(tmp_path)


def test_its_cost_is_counted(tmp_path: Path) -> None:
    reference(tmp_path)
    cost = chiasm.load(tmp_path).cost()
    patches, width, inner, layers = 25, 20, 44, 3
    layer = patches * (4 * width * width + 2 * width * inner) + 2 * patches * patches * width
    assert cost.encode_flops == 2 * (patches * width * 3 * 7 * 7 + layers * layer)
    assert cost.visual_tokens == LATENTS


def test_a_connector_without_a_mask_is_refused() -> None:
    tower = build_tower(AutoConfig.for_model("idefics2_vision", hidden_size=20, num_attention_heads=2, image_size=32))
    with pytest.raises(ValueError, match="'native' need a connector that takes a mask"):
        chiasm.connect(tower, tiny.language(), tokenizer=tiny.tokenizer(), features={"resolution": "native"})
