"""InternVL checkpoints of transformers load strictly, and give the same logits and the same text here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import chiasm
import contracts
import tiny
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine

IMAGE = 260


def reference(folder: Path, language: str = "qwen2", vision: dict[str, Any] | None = None, **options: Any) -> Any:
    """A saved model whose weights are all random: a class token or positions that start at zero would hide mistakes."""
    tower = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": [24, 24],
        "patch_size": [4, 4],
    }
    text = tiny.language(language).config
    changes = options.pop("text", {})
    tied = options.pop("tied", text.tie_word_embeddings)
    config = InternVLConfig(
        vision_config=tower | (vision or {}),
        text_config=text.to_dict() | changes,
        image_token_id=IMAGE,
        tie_word_embeddings=tied,
        **options,
    )
    torch.manual_seed(3)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def tiles(tokens: int = 9) -> dict[str, Tensor]:
    """Two rows: one picture of two tiles, and two pictures of one tile each, with text between them."""
    ids = torch.randint(0, 255, (2, 4 + 2 * tokens + 6))
    ids[0, 4 : 4 + 2 * tokens] = IMAGE
    ids[1, 2 : 2 + tokens] = IMAGE
    ids[1, 5 + tokens : 5 + 2 * tokens] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(4, 3, 24, 24), "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language": "llama", "vision_feature_layer": -2},
        {"vision": {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False, "attention_bias": True}},
        {"tied": False},
    ],
)
def test_logits_and_text_equal_the_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    internvl = reference(tmp_path, **options)
    contracts.check_equals_reference(chiasm.load(tmp_path).model, internvl, tiles())


def test_both_generations_of_names_load(tmp_path: Path) -> None:
    """`save_pretrained` writes those of v4.51; these are the model's own."""
    internvl = reference(tmp_path, language="llama")
    names = internvl.state_dict()
    assert "model.language_model.norm.weight" in names and "lm_head.weight" in names
    save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
    inputs = tiles()
    with torch.no_grad():
        ours = chiasm.load(tmp_path).model(**inputs).logits
        torch.testing.assert_close(ours, internvl(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_larger_blocks(tmp_path: Path) -> None:
    internvl = reference(tmp_path, vision={"image_size": [32, 32]}, downsample_ratio=0.25)
    inputs = tiles(4) | {"pixel_values": torch.randn(4, 3, 32, 32)}
    with torch.no_grad():
        theirs, ours = internvl(**inputs).logits, chiasm.load(tmp_path).model(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_saves_as_a_model_of_our_own(tmp_path: Path) -> None:
    reference(tmp_path / "theirs")
    vlm = chiasm.load(tmp_path / "theirs")
    vlm.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        inputs = tiles()
        assert torch.equal(chiasm.load(tmp_path / "ours").model(**inputs).logits, vlm.model(**inputs).logits)


def test_weights_are_read_strictly(tmp_path: Path) -> None:
    reference(tmp_path)
    contracts.check_strict_loading(tmp_path)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}


class WithoutVideos(InternVLProcessor):
    """Its video processor needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return argument and super().check_argument_for_proper_class(argument_name, argument)


def with_processor(folder: Path, videos: bool = True) -> tuple[Any, Any]:
    """A saved model and processor: nine visual tokens for a tile of 24 × 24 pixels, at most six tiles and the whole."""
    named = {name: token for name, token in TOKENS.items() if videos or name != "video_token"}
    internvl = reference(folder, text={"vocab_size": 260 + len(named)})
    backend = tiny.tokenizer(None)
    backend.add_tokens(list(named.values()), special_tokens=True)
    backend.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=named, pad_token="<|pad|>")
    images = GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, max_patches=6)
    processor = WithoutVideos(images, tokenizer, image_seq_length=9, chat_template=TEMPLATE) if videos else None
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return internvl, processor


def test_the_processor_gives_the_same_inputs(tmp_path: Path) -> None:
    internvl, processor = with_processor(tmp_path)
    vlm = chiasm.load(tmp_path)
    pictures = [tiny.picture(1), tiny.picture(2).resize((70, 21)), tiny.picture(3).resize((24, 24))]
    texts = ["<IMG_CONTEXT>\n<IMG_CONTEXT> Both?", "One <IMG_CONTEXT>"]
    expected = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    found = vlm.processor(images=pictures, text=texts)
    assert set(found) == {"input_ids", "attention_mask", "pixel_values"} and len(found["pixel_values"]) > 3
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    messages = tiny.ask("What?", 2)
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(images=pictures[:2], text=rendered, return_tensors="pt")
    found = vlm.processor(messages=messages, images=pictures[:2])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    tokens = internvl.generate(**found, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE], pad_token_id=258)
    text = processor.decode(tokens[0, found["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert vlm.chat(pictures[:2], "What?", max_new_tokens=4) == text
    vlm.save_pretrained(tmp_path / "again")
    again = chiasm.load(tmp_path / "again").processor(messages=messages, images=pictures[:2])
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_pictures_of_other_shapes_answer_together_as_alone(tmp_path: Path) -> None:
    with_processor(tmp_path)
    vlm = chiasm.load(tmp_path)
    images = [[tiny.picture(1)], [tiny.picture(2).resize((90, 20)), tiny.picture(3)], []]
    asked = [tiny.ask("What is it?", len(shown)) for shown in images]
    alone = [vlm.generate([a], [i], max_new_tokens=4)[0] for a, i in zip(asked, images, strict=True)]
    assert vlm.generate(asked, images, max_new_tokens=4) == alone
    contracts.check_engine_equals_generate(vlm)
    engine = Engine(vlm.model, vlm.processor)
    tickets = [engine.submit(a, i, Decoding(max_new_tokens=4)) for a, i in zip(asked * 2, images * 2, strict=True)]
    assert [ticket.text().strip() for ticket in tickets] == alone * 2 and tickets[4].cached_tokens > 0
    engine.close()


def test_a_tokenizer_without_its_tokens_is_refused(tmp_path: Path) -> None:
    with_processor(tmp_path)
    tiny.tokenizer(TEMPLATE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks <img> or </img>"):
        chiasm.load(tmp_path)


def test_settings_without_a_counterpart_are_refused(tmp_path: Path) -> None:
    reference(tmp_path, projector_hidden_act="relu")
    with pytest.raises(ValueError, match="projector_hidden_act='relu'"):
        chiasm.load(tmp_path)
    reference(tmp_path, vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="vision_feature_select_strategy='full'"):
        chiasm.load(tmp_path)
