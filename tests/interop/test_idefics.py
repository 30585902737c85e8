"""A transformers Idefics checkpoint gives the same logits and the same text here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessor, IdeficsProcessor
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

import chiasm
import contracts
import tiny
from chiasm.fusion.intermediate import ImageCache
from tiny import picture

CASES: dict[str, dict[str, Any]] = {
    "resampler, scalar gates": {"use_resampler": True, "alpha_type": "float", "cross_layer_interval": 1},
    "patches, vector gates, qk norms": {"alpha_type": "vector", "qk_layer_norms": True, "cross_layer_interval": 3}
    | {"num_hidden_layers": 6},
    "resampler with qk norms, tied table": {
        "use_resampler": True,
        "qk_norm_perceiver": True,
        "alpha_type": "vector",
        "qk_layer_norms": True,
        "cross_layer_interval": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 3e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "no added words": {"additional_vocab_size": 0, "cross_layer_interval": 2, "alpha_type": "float"},
}


def reference(folder: Path, **options: Any) -> IdeficsForVisionText2Text:
    """A model of four layers whose weights and gates are far from their initial values, saved to a folder."""
    perceiver = {
        "resampler_n_latents": 5,
        "resampler_depth": 2,
        "resampler_n_heads": 3,
        "resampler_head_dim": 7,
        "qk_layer_norms_perceiver": options.pop("qk_norm_perceiver", False),
    }
    vision = {"embed_dim": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 42, "intermediate_size": 50, "num_hidden_layers": 4, "num_attention_heads": 3}
    tokens = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    config = IdeficsConfig(
        **text | tokens | {"additional_vocab_size": 3} | options,
        vision_config=vision | {"image_size": 30, "patch_size": 10, "hidden_act": "gelu"},
        perceiver_config=perceiver,
    )
    torch.manual_seed(7)
    model = IdeficsForVisionText2Text(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def batch(images: int, added: bool = True) -> dict[str, Tensor]:
    """Two rows, one padded on the left; tokens see no picture, one, or several."""
    ids = torch.randint(0, 255, (2, 11))
    ids[:, [2, 5]] = 261 if added else 9
    if added:
        ids[:, 7] = 262
    seen = torch.randint(0, 2, (2, 11, images))
    seen[:, :2], seen[1, -1] = 0, 1
    attended = torch.ones_like(ids)
    attended[0, :2], ids[0, :2] = 0, 258
    pixels = torch.randn(2, images, 3, 30, 30)
    return {"input_ids": ids, "attention_mask": attended, "pixel_values": pixels, "image_attention_mask": seen}


@pytest.mark.parametrize(("case", "images"), list(zip(CASES, (3, 2, 2, 1), strict=True)))
def test_logits_and_text_equal_the_reference(tmp_path: Path, case: str, images: int) -> None:
    idefics = reference(tmp_path, **CASES[case])
    ours = chiasm.load(tmp_path).model
    inputs = batch(images, added=case != "no added words")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = idefics(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits[real], expected[real], rtol=1e-4, atol=1e-4)
        other = ours(**inputs | {"pixel_values": inputs["pixel_values"] + 1.0}).logits
    assert not torch.allclose(other[real], expected[real], atol=1e-2)
    greedy = {"max_new_tokens": 8, "do_sample": False, "bad_words_ids": [[ours.config.image_token_id]]}
    if case == "no added words":
        greedy.pop("bad_words_ids")
    for use_cache in (True, False):
        expected = idefics.generate(**inputs, **greedy, use_cache=use_cache)
        assert torch.equal(ours.generate(**inputs, **greedy, use_cache=use_cache), expected)


def test_beams_equal_the_reference(tmp_path: Path) -> None:
    idefics = reference(tmp_path, use_resampler=True)
    ours = chiasm.load(tmp_path).model
    inputs = batch(2)
    beams = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "bad_words_ids": [[261]]}
    expected = idefics.generate(**inputs, **beams)
    assert torch.equal(ours.generate(**inputs, **beams), expected)
    inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
    assert torch.equal(ours.generate(**inputs, **beams), expected)


def test_invariants_and_a_checkpoint_of_our_own(tmp_path: Path) -> None:
    reference(tmp_path, use_resampler=True, cross_layer_interval=2)
    vlm = chiasm.load(tmp_path)
    inputs = batch(2)
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_cached_equals_full(vlm.model, inputs)
    inputs.pop("image_attention_mask")
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_cached_equals_full(vlm.model, inputs)
    contracts.check_image_matters(vlm.model, inputs)


def test_encoded_pictures_are_image_features(tmp_path: Path) -> None:
    idefics = reference(tmp_path)
    ours = chiasm.load(tmp_path).model
    inputs = batch(2)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        encoded = idefics.model.vision_model(pixels.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 2))
        torch.testing.assert_close(ours.encode_images(pixels.flatten(0, 1)), encoded.flatten(0, 1))
        expected = idefics(**inputs, image_encoder_embeddings=encoded).logits[1]
        torch.testing.assert_close(ours(**inputs, image_features=encoded).logits[1], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="image_encoder_embeddings is not read here; pass the encoder's output as"):
        ours(**inputs, image_encoder_embeddings=encoded)


def test_weights_are_read_strictly(tmp_path: Path) -> None:
    reference(tmp_path)
    contracts.check_strict_loading(tmp_path)


def test_too_few_blocks_are_refused(tmp_path: Path) -> None:
    reference(tmp_path, num_hidden_layers=5, cross_layer_interval=3)
    with pytest.raises(ValueError, match="num_hidden_layers 5, expected a multiple of its cross_layer_interval 3"):
        chiasm.load(tmp_path)


def test_which_picture_is_seen_is_the_references_rule() -> None:
    """Random texts of words, pictures and ends, read at once and in pieces."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (60, 12), generator=generator)
    marks = SimpleNamespace(eos_token_id=1, convert_tokens_to_ids=lambda _: 2)
    incremental, _ = image_attention_mask_for_packed_input_ids(ids, marks, "pt")
    expected = incremental_to_binary_attention_mask(incremental, "pt", num_classes=12).bool()
    zeros = torch.zeros(60, dtype=torch.long)
    for pieces in ([12], [5, 1, 1, 5]):
        cache, seen = ImageCache([(torch.zeros(1, 1, 24, 1),) * 2], 2, zeros, zeros), []
        for piece in ids.split(pieces, dim=1):
            visible, cache = cache.read(piece == 2, piece == 1)
            seen.append(visible)
        assert torch.equal(torch.cat(seen, dim=1), expected)


def processors(folder: Path, **options: Any) -> tuple[IdeficsForVisionText2Text, IdeficsProcessor]:
    """A model with 260 known tokens and two or three added ones, and the reference's processor, saved to a folder."""
    words = tiny.tokenizer(chat_template=None)
    words.add_tokens(["<fake_token_around_image>", "<image>", "<end_of_utterance>"], special_tokens=True)
    words.padding_side = "left"
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    added = words.convert_tokens_to_ids("<fake_token_around_image>")
    model = reference(folder, vocab_size=added, additional_vocab_size=3, **ids, **options)
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=30), words)
    processor.save_pretrained(folder)
    return model, processor


def ask(*turns: str, images: int = 1) -> list[dict[str, Any]]:
    """A conversation that begins with pictures; users and answers take turns."""
    first = [{"type": "image"}] * images + [{"type": "text", "text": turns[0]}]
    roles = ["user", "assistant"] * len(turns)
    return [{"role": r, "content": c} for r, c in zip(roles, [first, *turns[1:]], strict=False)]


def test_the_processor_writes_what_the_references_writes(tmp_path: Path) -> None:
    idefics, theirs = processors(tmp_path, use_resampler=True)
    vlm = chiasm.load(tmp_path)
    end = "<end_of_utterance>"
    messages = [ask("What?", "A cat.", "And who is that?", images=2), ask("How many are there?")]
    pictures = [[picture(1), picture(2)], [picture(3)]]
    prompts = [
        ["User:", *pictures[0], f"What?{end}\nAssistant: A cat.{end}\nUser: And who is that?{end}\nAssistant:"],
        ["User:", *pictures[1], f"How many are there?{end}\nAssistant:"],
    ]
    expected = theirs(text=prompts, add_end_of_utterance_token=False)
    inputs = vlm.processor(messages=messages, images=pictures)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    pixels = expected["pixel_values"].flatten(0, 1)[:3]
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=0.05)
    with torch.no_grad():
        logits = idefics(**expected).logits
        real = expected["attention_mask"].bool()
        torch.testing.assert_close(vlm.model(**expected).logits[real], logits[real], rtol=1e-4, atol=1e-4)
        ours = vlm.model(**inputs | {"pixel_values": pixels}).logits
        torch.testing.assert_close(ours[real], logits[real], rtol=1e-4, atol=1e-4)
    answers = vlm.generate(messages, pictures, max_new_tokens=6)
    tokens = idefics.generate(
        **expected, max_new_tokens=6, do_sample=False, bad_words_ids=[[vlm.processor.image_token_id]]
    )
    texts = theirs.batch_decode(tokens[:, expected["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers == [text.strip() for text in texts]
    contracts.check_engine_equals_generate(vlm)
    assert vlm.model.generation_config.eos_token_id[-1] == theirs.tokenizer.convert_tokens_to_ids(end)


def test_a_saved_processor_keeps_its_frame(tmp_path: Path) -> None:
    processors(tmp_path)
    vlm = chiasm.load(tmp_path)
    vlm.save_pretrained(tmp_path / "ours")
    again = chiasm.load(tmp_path / "ours")
    conversation, pictures = ask("Which?", "This.", images=2), [picture(1), picture(2)]
    expected = vlm.processor.encode(conversation, supervise=True)
    assert again.processor.encode(conversation, supervise=True) == expected
    words = vlm.processor.tokenizer.decode([label for label in expected["labels"] if label >= 0])
    assert words == "This.<end_of_utterance>"
    assert again.chat(pictures, "Which?", max_new_tokens=4) == vlm.chat(pictures, "Which?", max_new_tokens=4)


def test_a_text_that_ends_hides_its_pictures_as_in_the_reference(tmp_path: Path) -> None:
    """Packed documents: behind the end of one, the next picture alone is seen."""
    idefics, theirs = processors(tmp_path)
    vlm = chiasm.load(tmp_path)
    eos, pad = theirs.tokenizer.eos_token, theirs.tokenizer.pad_token
    prompts = [
        [picture(1), picture(2), f"One.{eos}Two.", picture(3), f"Three.{eos}{eos}Four."],
        [f"Five.{eos}", picture(4), f"Six {pad} seven.{eos}"],
    ]
    expected = theirs(text=prompts)
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = expected["pixel_values"].flatten(0, 1)[:4]
    record: list[Tensor] = []
    with torch.no_grad():
        logits, real = idefics(**expected).logits, expected["attention_mask"].bool()
        ours = vlm.model(**inputs, record=record)
        torch.testing.assert_close(ours.logits[real], logits[real], rtol=1e-4, atol=1e-4)
    seen = record[0].mean(dim=1).unflatten(-1, (3, -1)).sum(dim=-1)
    torch.testing.assert_close(seen, expected["image_attention_mask"].float())
    contracts.check_cached_equals_full(vlm.model, inputs)
    cut = inputs["input_ids"].shape[1] - 3
    halves = [{name: inputs[name][:, part] for name in ("input_ids",)} for part in (slice(0, cut), slice(cut, None))]
    with torch.no_grad():
        first = vlm.model(
            **halves[0], **{n: inputs[n] for n in ("pixel_values",)}, attention_mask=inputs["attention_mask"][:, :cut]
        )
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1)[:, cut:]
        rest = vlm.model(
            **halves[1],
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            cache=first.cache,
            image_cache=first.image_cache,
        )
    torch.testing.assert_close(rest.logits, ours.logits[:, cut:], rtol=1e-4, atol=1e-4)
