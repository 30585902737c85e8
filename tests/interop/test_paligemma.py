"""A transformers PaliGemma checkpoint gives the same logits and the same text here, prefix mask included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import chiasm
import tiny
from contracts import (
    check_engine_equals_generate,
    check_equals_reference,
    check_saved_equals_loaded,
    check_strict_loading,
)

TEXT = {
    "vocab_size": 1420,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LANGUAGES = {
    "gemma": GemmaConfig(**TEXT, hidden_size=36, num_attention_heads=6, num_key_value_heads=2, head_dim=10),
    "gemma one head": GemmaConfig(**TEXT, hidden_size=28, num_attention_heads=3, num_key_value_heads=1, head_dim=14),
    "gemma2": Gemma2Config(
        **TEXT, hidden_size=36, num_attention_heads=4, num_key_value_heads=2, head_dim=10, sliding_window=9
    ),
}


def reference(
    folder: Path, language: str = "gemma", size: int = 30, patch: int = 10, **changes: Any
) -> PaliGemmaForConditionalGeneration:
    sizes = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 5}
    text = LANGUAGES[language]
    settings: dict[str, Any] = {
        "vision_config": SiglipVisionConfig(
            **sizes, image_size=size, patch_size=patch, vision_use_head=False
        ).to_dict(),
        "text_config": text.to_dict(),
        "projection_dim": text.hidden_size,
        "hidden_size": text.hidden_size,
        "image_token_index": 260,
    }
    torch.manual_seed(4)
    paligemma = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**settings | changes)).eval()
    paligemma.save_pretrained(folder)
    return paligemma


def batch(paligemma: PaliGemmaForConditionalGeneration, suffix: int = 0) -> dict[str, torch.Tensor]:
    """Two rows with a picture each; the first is shorter and padded on the left."""
    vision = paligemma.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    ids = torch.randint(0, 255, (2, tokens + 13))
    ids[0, :4] = 258
    ids[0, 4 : 4 + tokens] = 260
    ids[1, :tokens] = 260
    types = torch.zeros_like(ids)
    types[:, ids.shape[1] - suffix :] = 1
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    mask = (ids != 258).long()
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("size", "patch"), [(30, 10), (35, 7)])
@pytest.mark.parametrize("suffix", [0, 5])
def test_the_prefix_is_read_in_both_directions(
    language: str, size: int, patch: int, suffix: int, tmp_path: Path
) -> None:
    paligemma = reference(tmp_path, language, size, patch)
    vlm, inputs = chiasm.load(tmp_path), batch(paligemma, suffix)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = vlm.model(**inputs).logits, paligemma(**inputs).logits
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)
    greedy = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [260]}
    assert torch.equal(vlm.model.generate(**inputs, **greedy), paligemma.generate(**inputs, **greedy))
    whole = {name: value[1:] for name, value in inputs.items()}
    check_equals_reference(vlm.model, paligemma, whole)
    check_saved_equals_loaded(vlm, whole)


@pytest.mark.parametrize(
    ("language", "attention"), [("gemma", "sdpa"), ("gemma one head", "eager"), ("gemma2", "eager")]
)
@pytest.mark.parametrize("drop", [["token_type_ids"], ["token_type_ids", "attention_mask"], ["attention_mask"]])
def test_without_token_types_or_mask(language: str, attention: str, drop: list[str], tmp_path: Path) -> None:
    paligemma = reference(tmp_path, language)
    model = chiasm.load(tmp_path).model
    for one in (paligemma, model):
        one.set_attn_implementation(attention)
    inputs = {name: value[1:] for name, value in batch(paligemma, 3).items() if name not in drop}
    check_equals_reference(model, paligemma, inputs)


def test_static_cache(tmp_path: Path) -> None:
    paligemma = reference(tmp_path)
    model, inputs = chiasm.load(tmp_path).model, batch(paligemma)
    check = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [260], "disable_compile": True}
    expected = model.generate(**inputs, **check)
    assert torch.equal(model.generate(**inputs, **check, cache_implementation="static"), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_older_names(tied: bool, tmp_path: Path) -> None:
    paligemma = reference(tmp_path, tie_word_embeddings=tied)
    state = {}
    for name, value in paligemma.state_dict().items():
        old = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
        if old.startswith("language_model."):
            old = old.replace("language_model.", "language_model.model.")
        state[f"language_model.{old}" if old.startswith("lm_head") else old] = value.clone()
    save_file(state, tmp_path / "model.safetensors")
    check_equals_reference(chiasm.load(tmp_path).model, paligemma, {n: v[1:] for n, v in batch(paligemma).items()})


def test_weights_are_read_strictly(tmp_path: Path) -> None:
    reference(tmp_path)
    check_strict_loading(tmp_path)


def test_a_projection_of_another_width_is_told(tmp_path: Path) -> None:
    reference(tmp_path, projection_dim=24)
    with pytest.raises(ValueError, match="projection_dim is 24, but the language model's hidden_size is 36"):
        chiasm.load(tmp_path)


def with_processor(folder: Path) -> PaliGemmaProcessor:
    reference(folder)
    tokenizer = tiny.tokenizer(None)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = SiglipImageProcessorPil(size={"height": 30, "width": 30})
    images.image_seq_length = 9
    processor = PaliGemmaProcessor(images, tokenizer)
    processor.save_pretrained(folder)
    return processor


def test_the_processor_gives_the_same_inputs(tmp_path: Path) -> None:
    processor = with_processor(tmp_path)
    vlm = chiasm.load(tmp_path)
    pictures = [tiny.picture(1), tiny.picture(2)]
    for texts in (["<image>caption en", "<image>ocr"], ["caption en", "ocr"]):
        expected = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
        found = vlm.processor(images=pictures, text=texts)
        for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
        asked = vlm.processor(messages=[tiny.ask("caption en"), tiny.ask("ocr")], images=[[p] for p in pictures])
        assert torch.equal(asked["input_ids"], expected["input_ids"])
    check_engine_equals_generate(vlm)
    assert isinstance(vlm.chat(pictures[0], "caption en", max_new_tokens=3), str)
    sample = [*tiny.ask("caption en"), {"role": "assistant", "content": "a cat"}]
    trained = processor(images=pictures[0], text="<image>caption en", suffix="a cat", return_tensors="pt")
    padded = vlm.processor.pad([vlm.processor.encode(sample, 1, supervise=True)])
    for name in ("input_ids", "token_type_ids", "labels"):
        assert torch.equal(padded[name], trained[name])
    vlm.save_pretrained(tmp_path / "again")
    again = chiasm.load(tmp_path / "again").processor(images=pictures, text=["caption en", "ocr"])
    assert all(torch.equal(again[name], found[name]) for name in found)
