"""BLIP-2 and InstructBLIP checkpoints of transformers give the same logits and the same text here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    OPTConfig,
    PreTrainedModel,
    ProcessorMixin,
    T5Config,
)

import chiasm
import contracts
import tiny
from chiasm.data.chat import user_message

VIT = {"hidden_size": 28, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"image_size": 30, "patch_size": 10, "initializer_range": 0.2}
QFORMER = {"vocab_size": 262, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
QFORMER |= {"intermediate_size": 44, "max_position_embeddings": 19, "initializer_range": 0.2}
TOKENS = {"vocab_size": 262, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
TEXTS: dict[str, Any] = {
    "opt": OPTConfig(
        **TOKENS, hidden_size=36, ffn_dim=52, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=99
    ),
    "llama": tiny.language("llama").config,
    "t5": T5Config(**TOKENS, d_model=36, d_ff=52, d_kv=7, num_layers=2, num_heads=5, decoder_start_token_id=258),
}
KINDS: dict[str, Any] = {
    "blip2": (Blip2ForConditionalGeneration, Blip2Config, Blip2VisionConfig, Blip2QFormerConfig),
    "instructblip": (
        InstructBlipForConditionalGeneration,
        InstructBlipConfig,
        InstructBlipVisionConfig,
        InstructBlipQFormerConfig,
    ),
}
PAIRS = [("blip2", "opt"), ("blip2", "t5"), ("instructblip", "llama"), ("instructblip", "opt"), ("instructblip", "t5")]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def reference(folder: Path, kind: str, text: str) -> PreTrainedModel:
    model, config, vision, qformer = KINDS[kind]
    parts = {"vision_config": vision(**VIT).to_dict(), "qformer_config": qformer(**QFORMER).to_dict()}
    torch.manual_seed(3)
    made = model(config(**parts, text_config=TEXTS[text].to_dict(), num_query_tokens=5, image_token_index=260)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    return made


def inputs_of(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(0, 255, (2, 14))
    ids[:, :5] = 260
    mask = torch.ones_like(ids)
    ids[1, 12:], mask[1, 12:] = 258, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 30, 30)}
    if kind == "instructblip":
        inputs["qformer_input_ids"] = torch.randint(0, 41, (2, 7))
        inputs["qformer_attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return inputs


@pytest.mark.parametrize(("kind", "text"), PAIRS)
def test_logits_loss_and_text_equal_the_reference(kind: str, text: str, tmp_path: Path) -> None:
    theirs = reference(tmp_path, kind, text)
    ours = chiasm.load(tmp_path).model
    inputs = inputs_of(kind)
    if text == "t5":
        forward = inputs | {"decoder_input_ids": torch.randint(0, 255, (2, 6))}
        real = torch.ones(2, 6, dtype=torch.bool)
        labels = torch.randint(0, 255, (2, 6))
    else:
        forward, real = inputs, inputs["attention_mask"].bool()
        labels = inputs["input_ids"].masked_fill(~real | (inputs["input_ids"] == 260), -100)
    with torch.no_grad():
        torch.testing.assert_close(ours(**forward).logits[real], theirs(**forward).logits[real], **CLOSE)
        torch.testing.assert_close(ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss, **CLOSE)
    single = {name: value[:1] for name, value in inputs.items()}
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.3}):
        greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258} | options
        assert torch.equal(ours.generate(**single, **greedy), theirs.generate(**single, **greedy))


@pytest.mark.parametrize("text", ["opt", "t5"])
def test_a_caption_needs_no_text(text: str, tmp_path: Path) -> None:
    theirs = reference(tmp_path, "blip2", text)
    ours = chiasm.load(tmp_path).model
    pixels = inputs_of("blip2")["pixel_values"]
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 258}
    expected = theirs.generate(pixel_values=pixels, **greedy)
    assert torch.equal(ours.generate(pixel_values=pixels, **greedy), expected)


@pytest.mark.parametrize(("kind", "text"), PAIRS)
def test_saved_as_chiasm(kind: str, text: str, tmp_path: Path) -> None:
    reference(tmp_path, kind, text)
    inputs = inputs_of(kind)
    if text == "t5":
        inputs["decoder_input_ids"] = torch.randint(0, 255, (2, 6))
    contracts.check_saved_equals_loaded(chiasm.load(tmp_path), inputs)


def test_the_picture_matters_to_an_encoder_decoder(tmp_path: Path) -> None:
    reference(tmp_path, "blip2", "t5")
    model = chiasm.load(tmp_path).model
    inputs = inputs_of("blip2")
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    options = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    first, second = model.generate(**inputs, **options).scores, model.generate(**other, **options).scores
    assert not torch.allclose(torch.stack(first), torch.stack(second))
    with pytest.raises(ValueError, match=r"holds 10 image placeholders but no image was given"):
        model.generate(input_ids=inputs["input_ids"])


def test_weights_are_read_strictly(tmp_path: Path) -> None:
    reference(tmp_path, "blip2", "opt")
    contracts.check_strict_loading(tmp_path)


def test_word_embeddings_of_another_width_are_told(tmp_path: Path) -> None:
    text = TEXTS["opt"].to_diff_dict() | {"word_embed_proj_dim": 20}
    config = Blip2Config(vision_config=VIT, qformer_config=QFORMER, text_config=text, image_token_index=260)
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"word_embed_proj_dim in .* is 20, expected the hidden_size 36"):
        chiasm.load(tmp_path)


def test_without_processor_files_only_the_processor_is_missing(tmp_path: Path) -> None:
    reference(tmp_path, "instructblip", "llama")
    vlm = chiasm.load(tmp_path)
    with pytest.raises(ValueError, match="this model has no processor"):
        vlm.chat(None, "Hello?")


def with_processor(folder: Path, kind: str) -> ProcessorMixin:
    images = BlipImageProcessor(size={"height": 30, "width": 30})
    words = tiny.tokenizer(None)
    reader = tiny.tokenizer(None)
    if kind == "blip2":
        processor: ProcessorMixin = Blip2Processor(images, words, num_query_tokens=5)
    else:
        processor = InstructBlipProcessor(images, words, reader, num_query_tokens=5)
    processor.save_pretrained(folder)
    return processor


@pytest.mark.parametrize("kind", KINDS)
def test_answers_can_be_learned(kind: str, tmp_path: Path) -> None:
    reference(tmp_path, kind, "opt")
    with_processor(tmp_path, kind)
    processor = chiasm.load(tmp_path).processor
    told = [*user_message("What?", 1), {"role": "assistant", "content": "A cat."}]
    encoded = processor.encode(told, 1, supervise=True)
    assert processor.tokenizer.decode([label for label in encoded["labels"] if label >= 0]).strip() == "A cat."


@pytest.mark.parametrize(("kind", "text"), PAIRS)
def test_processor_gives_the_same_inputs_and_chat_answers(kind: str, text: str, tmp_path: Path) -> None:
    theirs = reference(tmp_path, kind, text)
    processor = with_processor(tmp_path, kind)
    vlm = chiasm.load(tmp_path)
    prompt, picture = "What is it?", Image.new("RGB", (30, 30), (200, 30, 90))
    begin, end = ("", "<|im_end|>") if text == "t5" else ("<|bos|>", "")
    asked = f"Question: {prompt} Answer:" if kind == "blip2" else prompt
    expected = processor(images=picture, text=f"{begin}{asked}{end}", return_tensors="pt", add_special_tokens=False)
    ours = vlm.processor(messages=user_message(prompt, 1), images=[picture])
    for name in ("input_ids", "attention_mask", "pixel_values"):
        torch.testing.assert_close(ours[name], expected[name], **CLOSE)
    if kind == "instructblip":
        assert vlm.processor.instruction_tokenizer.decode(ours["instruction_ids"][0]) == prompt
        expected |= {"qformer_input_ids": ours["instruction_ids"], "qformer_attention_mask": ours["instruction_mask"]}
    tokens = theirs.generate(**expected, max_new_tokens=5, do_sample=False, pad_token_id=258)
    prompt_length = 0 if text == "t5" else ours["input_ids"].shape[1]
    answer = processor.tokenizer.decode(tokens[0, prompt_length:], skip_special_tokens=True).strip()
    assert vlm.chat(picture, prompt, max_new_tokens=5) == answer
    assert "".join(vlm.stream(picture, prompt, max_new_tokens=5)).strip() == answer


def test_the_qformer_of_a_half_precision_checkpoint_stays_in_float32(tmp_path: Path) -> None:
    reference(tmp_path, "blip2", "opt").to(torch.float16).save_pretrained(tmp_path)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours = chiasm.load(tmp_path).model
    assert ours.connector.dtype == theirs.query_tokens.dtype == torch.float32
    assert ours.vision.model.dtype == ours.language.dtype == torch.float16
    inputs = inputs_of("blip2")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        first, second = ours(**inputs).logits[real], theirs(**inputs).logits[real]
    assert (first - second).norm() < 0.03 * second.norm()
    assert chiasm.load(tmp_path, dtype=torch.float32).model.vision.model.dtype == torch.float32
