"""The unified transformer keeps the invariants for both image inputs and every kind of positions."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import chiasm
import contracts
import tiny
from chiasm.fusion.unified import UnifiedModel
from chiasm.positions.sequence import POSITIONS
from tiny import ask, picture

VQ = {"name": "vq", "image_size": [24, 16], "levels": [4, 3], "width": 8, "depth": 1}
PATCHES = {"name": "patches", "patch_size": 10}
INPUTS = {"vq": VQ, "patches": PATCHES}


def connect(image_input: str = "patches", language: Any = None, **options: Any) -> chiasm.VLM:
    language = tiny.language() if language is None else language
    return chiasm.connect(
        language=language, fusion="unified", image_input=INPUTS[image_input], tokenizer=tiny.tokenizer(), **options
    )


def batch(vlm: chiasm.VLM) -> dict[str, torch.Tensor]:
    return dict(vlm.processor(messages=[ask("What?"), ask("This?")], images=[[picture(1)], [picture(2)]]))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("image_input", INPUTS)
def test_invariants(image_input: str, positions: str) -> None:
    vlm = connect(image_input, positions=positions)
    assert isinstance(vlm.model, UnifiedModel)
    if vlm.model.language.model.modality_embeddings is not None:
        torch.nn.init.normal_(vlm.model.language.model.modality_embeddings.weight)
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


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("image_input", INPUTS)
def test_a_batch_and_an_engine_answer_as_one_does(image_input: str, attention: str) -> None:
    vlm = connect(image_input, positions="mrope", attention=attention)
    messages = [ask("Short?"), ask("A longer question about two?", 2), ask("None.", 0)]
    contracts.check_batched_equals_single(vlm, messages, [[picture(1)], [picture(2), picture(3)], []])
    contracts.check_engine_equals_generate(vlm)


def test_a_prefix_needs_no_padding_mask() -> None:
    vlm = connect("patches", positions="mrope", attention="prefix")
    inputs = batch(vlm)
    rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        torch.testing.assert_close(vlm.model(**rest).logits, vlm.model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_text_alone_is_the_language_models() -> None:
    for positions in POSITIONS:
        vlm, language = connect(positions=positions), tiny.language()
        tokens = torch.randint(0, 250, (2, 9))
        with torch.no_grad():
            ours = vlm.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            theirs = language(tokens, attention_mask=torch.ones_like(tokens)).logits
        markers = vlm.model.settings.markers
        kept = [token for token in range(theirs.shape[-1]) if token not in markers]
        assert torch.equal(ours[..., kept], theirs[..., kept])


@pytest.mark.parametrize("image_input", INPUTS)
def test_losses_agree(image_input: str) -> None:
    vlm = connect(image_input, positions="rope2d")
    inputs = batch(vlm)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    contracts.check_losses_agree(vlm.model, inputs, labels, next(vlm.model.language.parameters()))


@pytest.mark.parametrize("size", [(30, 40), (7, 3), (131, 12), (9, 250)])
def test_pictures_of_any_shape(size: tuple[int, int]) -> None:
    """Rows end with their mark, positions follow the grid, and a long strip is shrunk to what is allowed."""
    vlm = connect(positions="mrope")
    vlm.processor.image_processor.max_patches = 20
    shown = picture(1).resize(size)
    inputs = dict(vlm.processor(messages=ask("What?"), images=[shown]))
    frames, rows, columns = inputs["image_grid_thw"][0].tolist()
    assert frames == 1 and rows * columns <= 20 and inputs["pixel_values"].shape == (rows * columns, 300)
    row = vlm.processor.placeholders.row
    assert int((inputs["input_ids"] == row).sum()) == rows
    whole = vlm.model.whole_positions(inputs["input_ids"], None, inputs["attention_mask"], inputs["image_grid_thw"])
    told = vlm.model.whole_positions(inputs["input_ids"], None, inputs["attention_mask"])
    assert torch.equal(whole, told)
    first = int((inputs["input_ids"][0] == vlm.model.config.image_token_id).nonzero()[0])
    assert (whole[2, 0, first : first + columns + 1] - whole[2, 0, first]).tolist() == [*range(columns + 1)]
    assert vlm.chat(shown, "What?", max_new_tokens=2) is not None


def test_frames_of_a_video_have_a_time() -> None:
    vlm = connect(positions="mrope")
    video = np.stack([np.asarray(picture(seed)) for seed in range(3)])
    inputs = dict(vlm.processor(messages=ask("What?"), images=[[video]]))
    assert inputs["image_grid_thw"].tolist() == [[3, 4, 3]]
    whole = vlm.model.whole_positions(inputs["input_ids"], None, None, inputs["image_grid_thw"])
    visual = vlm.model.visual_places(inputs["input_ids"], None)[0]
    times = whole[0, 0, visual] - whole[0, 0, visual].min()
    assert times.tolist() == [frame for frame in range(3) for _ in range(16)]
    other = video.copy()
    other[-1] = 0
    changed = dict(vlm.processor(messages=ask("What?"), images=[[other]]))
    with torch.no_grad():
        assert not torch.equal(vlm.model(**inputs).logits[:, -1], vlm.model(**changed).logits[:, -1])
    new = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    told = vlm.processor.decode(new, skip_special_tokens=True).strip()
    assert vlm.generate([ask("What?")], [[video]], max_new_tokens=3)[0].strip() == told


def test_pictures_in_answers_are_learned_as_codes() -> None:
    vlm = connect("vq")
    drawn = [{"role": "user", "content": "Draw it"}, {"role": "assistant", "content": [{"type": "image"}]}]
    encoded = vlm.processor.encode(drawn, 1, supervise=True)
    inputs = vlm.processor.pad([encoded])
    pixels = vlm.processor.image_processor([picture(1)])["pixel_values"]
    places = inputs["input_ids"] == vlm.model.config.image_token_id
    assert int((places & (inputs["labels"] == vlm.model.config.image_token_id)).sum()) == 6
    loss = vlm.model(**inputs, pixel_values=pixels).loss
    codes = vlm.model.code_tokens(pixels)
    ids = inputs["input_ids"].masked_scatter(places, codes)
    labels = torch.where(inputs["labels"] == -100, -100, ids)
    again = vlm.model(input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels).loss
    torch.testing.assert_close(loss, again)
    moved = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(loss, vlm.model(**inputs, pixel_values=pixels, shift_labels=moved).loss)
    with pytest.raises(ValueError, match="the labels hold pictures, which only the image input 'vq'"):
        patches = connect("patches")
        sample = patches.processor.encode(drawn, 1, supervise=True, tiles=[(1, 2, 2)])
        patches.model(**patches.processor.pad([sample]), pixel_values=torch.zeros(4, 300))


def test_patches_may_come_row_by_row() -> None:
    vlm = connect("patches")
    inputs = batch(vlm)
    patches = len(inputs["pixel_values"]) // 2
    rows = inputs | {"pixel_values": inputs["pixel_values"].unflatten(0, (2, patches))}
    with torch.no_grad():
        ours, flat = vlm.model(**rows), vlm.model(**inputs)
    assert torch.equal(ours.logits, flat.logits) and ours.visual_tokens.shape[:2] == (2, patches)
    assert len(ours.image_outputs.pooler_output) == 2


def test_patches_are_not_learned_from_targets_that_are_moved() -> None:
    vlm = connect("patches")
    inputs = batch(vlm)
    shifted, image = inputs["input_ids"].roll(-1, 1), vlm.model.config.image_token_id
    words = torch.where(shifted == image, -100, shifted)
    labels = torch.where(inputs["input_ids"] == image, -100, inputs["input_ids"])
    loss = vlm.model(**inputs, labels=labels, shift_labels=shifted).loss
    assert torch.equal(loss, vlm.model(**inputs, labels=labels, shift_labels=words).loss)


def test_z_loss_is_for_training() -> None:
    vlm = connect(unified={"z_loss": 0.5})
    tokens = torch.randint(0, 250, (1, 9))
    asked = vlm.model(input_ids=tokens, labels=tokens)
    with_z = vlm.model.train()(input_ids=tokens, labels=tokens).loss
    whole = vlm.model.language(inputs_embeds=vlm.model.embed(tokens, None, None)).logits[:, :-1]
    torch.testing.assert_close(with_z, asked.loss + 0.5 * whole.logsumexp(dim=-1).square().mean())


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="image_input 'pixels' is unknown; choose one of patches, vq"):
        chiasm.connect(language=tiny.language(), fusion="unified", image_input="pixels")
    with pytest.raises(ValueError, match="image_input vq: unknown option 'size'; known ones are image_size"):
        chiasm.connect(language=tiny.language(), fusion="unified", image_input={"name": "vq", "size": 3})
    with pytest.raises(ValueError, match="connector= is not for fusion 'unified': it has no vision encoder"):
        connect(connector="mlp")
    with pytest.raises(ValueError, match="image_size= is not for fusion 'unified': write it into image_input"):
        connect(image_size=64)
    with pytest.raises(ValueError, match="positions= is not for fusion 'early'"):
        chiasm.connect(tiny.vision(), tiny.language(), positions="mrope")
    with pytest.raises(ValueError, match="unified option 'norm' is unknown; known ones are norm_order, qk_norm"):
        connect(unified={"norm": "rms"})
    with pytest.raises(ValueError, match="positions 'alibi' is unknown"):
        connect(positions="alibi")


def test_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention is told for models with an encoder .* \(fusion 'unified'"):
        connect("vq").attention([picture(1)], "What?")


def test_from_nothing() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}
    vlm = chiasm.connect(
        language=sizes, fusion="unified", image_input=VQ, positions="mrope", unified={"qk_norm": "rms"}, seed=3
    )
    contracts.check_saved_equals_loaded(vlm, batch(vlm))
    assert vlm.chat([picture(1)], "사과?", max_new_tokens=4) is not None


@pytest.mark.parametrize("image_input", INPUTS)
def test_from_nothing_in_a_language_models_sizes(image_input: str) -> None:
    """Sizes and words are the language model's, the weights are drawn from the seed."""
    fresh = connect(image_input, unified={"weights": "random"})
    started, again = connect(image_input), connect(image_input, unified={"weights": "random"})
    shapes = {name: tensor.shape for name, tensor in started.model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in fresh.model.state_dict().items()}
    assert fresh.model.language.config.to_dict() == started.model.language.config.to_dict()
    matrix = "language.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(fresh.model.state_dict()[matrix], started.model.state_dict()[matrix])
    assert torch.equal(fresh.model.state_dict()[matrix], again.model.state_dict()[matrix])
    with pytest.raises(ValueError, match="unified option weights is 'none'; choose one of pretrained, random"):
        connect(unified={"weights": "none"})
    with pytest.raises(ValueError, match="has sizes alone: leave it out"):
        connect(language={"hidden_size": 24, "num_attention_heads": 2}, unified={"weights": "pretrained"})


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("image_input", INPUTS)
def test_cost_is_what_is_counted(image_input: str, images: int) -> None:
    vlm = connect(image_input, positions="mrope")
    vlm.processor.image_processor.size = {"height": 24, "width": 16}
    vlm.model.vision.config.image_size = [24, 16]
    inputs = dict(vlm.processor(messages=[ask("What?", images)], images=[[picture(1), picture(2)][:images]]))
    places = vlm.model.visual_places(inputs["input_ids"], None)
    framed = 2 * images
    text = inputs["input_ids"].shape[1] - int(places.sum()) - framed
    told = vlm.cost(images=images, text_tokens=text)
    assert told.sequence == inputs["input_ids"].shape[1]
    assert told.parameters == {
        "vision": sum(p.numel() for p in vlm.model.vision.parameters()),
        "language": sum(p.numel() for p in vlm.model.language.parameters()),
    }
    vlm.model.language.set_attn_implementation("eager")  # the fused kernel is not counted on a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vlm.model(**inputs, logits_to_keep=1)
    assert counter.get_total_flops() == told.encode_flops + told.prefill_flops
    cache = vlm.model(**inputs).cache
    assert told.kv_cache_bytes == sum(2 * layer.keys.numel() * 4 for layer in cache.layers)
