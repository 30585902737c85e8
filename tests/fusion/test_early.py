"""Early fusion keeps the invariants for every pair of a tiny encoder and a tiny language model."""

from typing import Any

import pytest
import torch

import chiasm
import contracts
import tiny
from chiasm.connectors import CONNECTORS
from chiasm.fusion.adapters import add_adapter
from tiny import ask, picture

PAIRS = [(vision, language) for vision in tiny.VISION_FAMILIES for language in tiny.LANGUAGE_FAMILIES]


def connect(vision: str = "clip", language: str = "llama", **options: Any) -> chiasm.VLM:
    return chiasm.connect(tiny.vision(vision), tiny.language(language), tokenizer=tiny.tokenizer(), **options)


def batch(vlm: chiasm.VLM) -> dict[str, torch.Tensor]:
    """Two prompts of one length, so that nothing is padded: one picture, and then another."""
    return dict(vlm.processor(messages=[ask("What?"), ask("This?")], images=[[picture(1)], [picture(2)]]))


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_every_pair(vision: str, language: str) -> None:
    vlm = connect(vision, language)
    inputs = batch(vlm)
    contracts.check_image_matters(vlm.model, inputs)
    contracts.check_cached_equals_full(vlm.model, inputs)
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_padding_is_ignored(vlm.model, inputs, vlm.processor.tokenizer.pad_token_id)
    contracts.check_embeddings_equal_tokens(vlm.model, inputs)
    contracts.check_generation_strategies(vlm.model, inputs)
    contracts.check_continues(vlm.model, inputs)
    contracts.check_assistant(vlm)
    contracts.check_attention_implementations(
        vlm.model, lambda model: model(**inputs).logits[inputs["attention_mask"].bool()]
    )
    contracts.check_text_only_is_the_language_model(vlm.model, tiny.language(language), torch.randint(0, 250, (2, 9)))


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector(connector: str) -> None:
    vlm = connect(connector=tiny.connector(connector))
    contracts.check_saved_equals_loaded(vlm, batch(vlm))
    contracts.check_image_matters(vlm.model, batch(vlm))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_parts_of_different_precision(language: str, dtypes: tuple[str, str], tmp_path: Any) -> None:
    parts = {"vision": tiny.vision(), "language": tiny.language(language)}
    for (name, part), dtype in zip(parts.items(), dtypes, strict=True):
        part.save_pretrained(tmp_path / name)
        parts[name] = type(part).from_pretrained(tmp_path / name, dtype=dtype)
    vlm = chiasm.connect(**parts, tokenizer=tiny.tokenizer())
    contracts.check_part_dtypes_survive(vlm, batch(vlm))
    add_adapter(vlm.model, "language", rank=2)
    contracts.check_part_dtypes_survive(vlm, batch(vlm))


@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_batched_equals_single(language: str) -> None:
    vlm = connect(language=language)
    messages = [
        ask("Short?"),
        ask("A longer question about two pictures?", 2),
        [{"role": "user", "content": "No picture."}],
    ]
    contracts.check_batched_equals_single(vlm, messages, [[picture(1)], [picture(2), picture(3)], []])


@pytest.mark.parametrize("direct", [True, False])
def test_losses_agree(direct: bool) -> None:
    vlm = connect()
    vlm.model.config.direct_head = direct
    inputs = batch(vlm)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    contracts.check_losses_agree(vlm.model, inputs, labels)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_visual_tokens_are_as_loud_as_words(connector: str) -> None:
    """Where a norm comes last, loudness is the norm's own."""
    vlm = connect(connector=tiny.connector(connector))
    if vlm.model.connector.output is None:
        return
    inputs = batch(vlm)
    loudness = vlm.model(**inputs).visual_tokens.square().mean().sqrt()
    words = vlm.model.get_input_embeddings().weight.square().mean().sqrt()
    assert 0.3 < loudness / words < 3.0


def test_a_convolutional_encoder_tells_where() -> None:
    vlm = connect("convnext")
    assert vlm.model.config.patch_positions == "grid"
    same_everywhere = torch.ones(1, vlm.model.vision.num_patches, vlm.model.vision.width)
    tokens = vlm.model.connect_features(same_everywhere)[0]
    assert not torch.allclose(tokens[0], tokens[1])


@pytest.mark.parametrize(("vision", "patch_positions"), [("clip", "grid"), ("dinov2", "none")])
def test_prefix_tokens_stand_in_the_sequence(vision: str, patch_positions: str) -> None:
    vlm = connect(vision, features={"prefix": "keep"}, patch_positions=patch_positions)
    assert vlm.model.num_image_tokens == 10
    contracts.check_saved_equals_loaded(vlm, batch(vlm))
    contracts.check_image_matters(vlm.model, batch(vlm))


def test_wrong_image_counts_name_both() -> None:
    vlm = connect()
    with pytest.raises(ValueError, match=r"1 image placeholder.*2 image"):
        vlm.processor(messages=[ask("What?")], images=[[picture(), picture()]])
    inputs = batch(vlm)
    with pytest.raises(ValueError, match=r"18 image placeholders but 1 image\(s\) give 9"):
        vlm.model(**(inputs | {"pixel_values": inputs["pixel_values"][:1]}))
    inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="18 image placeholders but no image"):
        vlm.model(**inputs)


def test_beams_keep_the_pictures_of_a_row_together() -> None:
    vlm = connect()
    messages, images = [ask("Both?", 2), ask("One of?")], [[picture(1), picture(2)], [picture(3)]]
    inputs = vlm.processor(messages=messages, images=images)
    beams = vlm.model.generate(**inputs, num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=258)
    single = vlm.processor(messages=messages[:1], images=images[:1])
    alone = vlm.model.generate(**single, num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=258)
    assert torch.equal(beams[0, inputs["input_ids"].shape[1] :], alone[0, single["input_ids"].shape[1] :])


def test_a_repetition_penalty_never_meets_the_placeholder() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<extra>"])
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tokenizer)
    assert vlm.model.config.image_token_id == vlm.model.config.text_config.vocab_size
    assert isinstance(vlm.chat(picture(), "What?", max_new_tokens=4, repetition_penalty=1.3), str)


def test_stream_equals_chat() -> None:
    vlm = connect()
    whole = vlm.chat(picture(), "What is this?", max_new_tokens=12)
    assert "".join(vlm.stream(picture(), "What is this?", max_new_tokens=12)) == whole


def test_an_error_while_streaming_is_raised() -> None:
    vlm = connect()
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        list(vlm.stream(picture(), "What?", max_new_tokens=0))


@pytest.mark.parametrize("language", ["gpt2", "llama"])
def test_a_prompt_beyond_the_context_names_both_counts(language: str) -> None:
    vlm = connect(language=language)
    prompt = "x" * 900
    tokens = vlm.processor(messages=[ask(prompt)], images=[[picture()]])["input_ids"].shape[1]
    room = 1024 - tokens
    assert isinstance(vlm.chat(picture(), prompt, max_new_tokens=room), str)
    expected = rf"{tokens} tokens and max_new_tokens={room + 1} are 1025 tokens, but .* context is 1024; shorten"
    with pytest.raises(ValueError, match=expected):
        vlm.chat(picture(), prompt, max_new_tokens=room + 1)
    with pytest.raises(ValueError, match=expected):
        list(vlm.stream(picture(), prompt, max_new_tokens=room + 1))


def test_cached_features_equal_pictures() -> None:
    vlm = connect()
    inputs = batch(vlm)
    with torch.no_grad():
        expected = vlm.model(**inputs).logits
        features = vlm.model.encode_images(inputs.pop("pixel_values"))
        assert torch.equal(vlm.model(**inputs, image_features=features).logits, expected)


def test_a_model_without_tokenizer_loads_and_says_what_is_missing(tmp_path: Any) -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language())
    with pytest.raises(ValueError, match="no processor"):
        vlm.chat(picture(), "What?")
    vlm.save_pretrained(tmp_path)
    again = chiasm.load(tmp_path)
    with pytest.raises(ValueError, match="no processor"):
        again.processor  # noqa: B018


def test_text_only_batches_reach_the_connector_with_weight_zero() -> None:
    vlm = connect()
    vlm.model.train()
    ids = torch.randint(0, 250, (2, 7))
    vlm.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in vlm.model.connector.parameters())


@pytest.mark.parametrize("language", ["llama", "qwen2"])
def test_the_placeholder_is_never_chosen(language: str) -> None:
    """With room in the vocabulary the head could choose it, and the next step would look for a picture."""
    vlm = connect(language=language)
    token = vlm.model.config.image_token_id
    assert token < vlm.model.config.text_config.vocab_size
    inputs = batch(vlm)
    with torch.no_grad():
        hidden = vlm.model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1].mean(dim=0)
        vlm.model.get_output_embeddings().weight[token] = 100 * hidden
    answer = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=258)
    assert token not in answer[:, inputs["input_ids"].shape[1] :]


def test_tokens_of_the_vision_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fusion early reads visual tokens of width 36, .* perceiver_resampler .* 24"):
        connect(connector={**tiny.connector("perceiver_resampler"), "project": False})
