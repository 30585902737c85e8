"""Chiasm models become checkpoints that transformers loads by itself, with the same inputs, logits and weights."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import test_blip2
import test_idefics
import test_idefics2
import test_idefics3
import test_internvl
import test_llava
import test_llava_next
import test_paligemma
import test_unified_loaders
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    pipeline,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import is_torchvision_available
from typer.testing import CliRunner

import chiasm
import chiasm.api
import tiny
from chiasm.cli import app
from chiasm.fusion.adapters import add_adapter
from chiasm.interop.convert import KINDS, ROUTES, convert, route
from chiasm.interop.export.check import QUESTION, probe_picture
from chiasm.interop.export.pictures import published_images
from chiasm.interop.export.prompts import portable_template
from chiasm.vision.image_processor import ChiasmImageProcessor

REFERENCES: dict[str, Any] = {
    "blip2": lambda folder: test_blip2.reference(folder, "blip2", "opt"),
    "blip2 t5": lambda folder: test_blip2.reference(folder, "blip2", "t5"),
    "instructblip": lambda folder: test_blip2.reference(folder, "instructblip", "llama"),
    "idefics": lambda folder: test_idefics.reference(folder, **test_idefics.CASES["resampler, scalar gates"]),
    "idefics patches": lambda folder: test_idefics.reference(
        folder, **test_idefics.CASES["patches, vector gates, qk norms"]
    ),
    "idefics without added words": lambda folder: test_idefics.reference(folder, additional_vocab_size=0),
    "idefics2": test_idefics2.reference,
    "idefics3": test_idefics3.reference,
    "smolvlm": lambda folder: test_idefics3.reference(folder, "smolvlm", scale_factor=1),
    "internvl": test_internvl.reference,
    "paligemma": test_paligemma.reference,
    "llava": lambda folder: (test_llava.reference(folder), test_llava.theirs(folder)),
    "llava tied": lambda folder: test_llava.reference(folder, "siglip", tie_word_embeddings=True),
    "llava-next": lambda folder: (test_llava_next.reference(folder), test_llava_next.with_processor(folder)),
    "llava-next, siglip, tied": lambda folder: test_llava_next.reference(
        folder, "siglip", tie_word_embeddings=True, vision_feature_layer=[1, -2]
    ),
    "chameleon": lambda folder: test_unified_loaders.chameleon(tie_word_embeddings=True).save_pretrained(folder),
    "chameleon 34b": lambda folder: test_unified_loaders.chameleon(
        swin_norm=True, attention_bias=True, mlp_bias=True
    ).save_pretrained(folder),
    "fuyu": lambda folder: test_unified_loaders.fuyu().save_pretrained(folder),
    "qwen2-vl": lambda folder: test_unified_loaders.qwen2_vl().save_pretrained(folder),
    "qwen2-vl tied": lambda folder: test_unified_loaders.qwen2_vl(tie_word_embeddings=True).save_pretrained(folder),
}


def blip(kind: str, text: str) -> Any:
    return lambda folder: (test_blip2.reference(folder, kind, text), test_blip2.with_processor(folder, kind))


WITH_PROCESSORS: dict[str, Any] = {
    "blip2": blip("blip2", "opt"),
    "blip2 t5": blip("blip2", "t5"),
    "instructblip": blip("instructblip", "llama"),
    "idefics": lambda folder: test_idefics.processors(folder, use_resampler=True),
    "idefics2": test_idefics2.with_processor,
    "idefics3": test_idefics3.with_processor,
    "idefics3 in tiles": lambda folder: test_idefics3.with_processor(folder, splitting=True),
    "llava-next": test_llava_next.with_processor,
    "llava-next, siglip": lambda folder: test_llava_next.with_processor(folder, "siglip"),
    "paligemma": test_paligemma.with_processor,
    "chameleon": test_unified_loaders.chameleon_with_processor,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    REFERENCES[name](tmp_path / "first")
    vlm = chiasm.load(tmp_path / "first")
    done = convert(vlm.model, vlm._processor, "transformers", tmp_path / "out")
    assert done.difference is not None and done.difference < 1e-4
    before, after = vlm.model.state_dict(), chiasm.load(tmp_path / "out").model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_PROCESSORS)
def test_a_processor_goes_along(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    WITH_PROCESSORS[name](tmp_path / "first")
    vlm = chiasm.load(tmp_path / "first", dtype=dtype)
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    assert done.difference is not None and done.difference < (1e-4 if dtype == torch.float32 else 0.05)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    exported = KINDS[route(vlm.model)].export(vlm.model, vlm.processor)
    inputs = exported.ask(AutoProcessor.from_pretrained(tmp_path / "out"), QUESTION, tiny.picture()).to(dtype)
    assert theirs.dtype == dtype
    if dtype != torch.float32:
        return  # roundings decide between words that are as likely
    tokens = theirs.generate(**inputs, max_new_tokens=5, do_sample=False)
    tokens = tokens if theirs.config.is_encoder_decoder else tokens[:, inputs["input_ids"].shape[1] :]
    text = vlm.processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    assert text == vlm.chat(tiny.picture(), "What is it?", max_new_tokens=5)
    padded = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.padding_side
    assert padded == ("right" if theirs.config.is_encoder_decoder else "left")


CONNECTED: dict[str, dict[str, Any]] = {
    "clip": {"connector": "mlp"},
    "clip, all layers, class token": {"connector": "mlp", "features": {"layers": [1, -2], "prefix": "keep"}},
    "siglip": {"vision": "siglip", "connector": {"name": "mlp", "width": 20, "activation": "silu"}},
    "siglip, linear": {"vision": "siglip", "language": "qwen2", "connector": "linear"},
    "no bias": {"connector": {"name": "linear", "bias": False}, "language": "gemma3"},
    "gpt2": {"connector": {"name": "mlp", "bias": False}, "language": "gpt2"},
    "padded": {"connector": "mlp", "resize_mode": "pad"},
}


def connected(vision: str = "clip", language: str = "llama", **options: Any) -> chiasm.VLM:
    return chiasm.connect(tiny.vision(vision), tiny.language(language), tokenizer=tiny.tokenizer(), **options)


@pytest.mark.parametrize("name", CONNECTED)
def test_a_connected_model_becomes_llava(name: str, tmp_path: Path) -> None:
    vlm = connected(**CONNECTED[name])
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path)
    assert done.kind == "llava" and done.difference is not None and done.difference < 1e-4
    again = chiasm.load(tmp_path)
    inputs = vlm.processor(messages=QUESTION, images=probe_picture(vlm.model))
    found = again.processor(messages=QUESTION, images=probe_picture(vlm.model))
    assert all(torch.equal(found[key], inputs[key]) for key in inputs)
    with torch.no_grad():
        expected = vlm.model(**inputs).logits
        torch.testing.assert_close(again.model(**inputs).logits[..., :261], expected, rtol=1e-4, atol=1e-4)
    prompts = ["What is it?", "Is it another one of those, or what?"]
    asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}] for words in prompts]
    theirs, words = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    shown = [probe_picture(vlm.model)] * 2
    texts = [words.apply_chat_template(one, add_generation_prompt=True) for one in asked]
    batch = words(images=shown, text=texts, padding=True, return_tensors="pt")
    made = theirs.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    told = [one.strip() for one in words.batch_decode(made, skip_special_tokens=True)]
    assert told == [vlm.chat(probe_picture(vlm.model), prompt, max_new_tokens=5) for prompt in prompts]


def test_pictures_may_be_scaled_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rounds some pixels to the next level."""
    scaled: Any = SiglipImageProcessorPil.resize
    monkeypatch.setattr(SiglipImageProcessorPil, "resize", lambda *given, **told: scaled(*given, **told) // 2 * 2)
    vlm = connected("siglip", connector="mlp")
    monkeypatch.setattr("chiasm.interop.export.check.is_torchvision_available", lambda: True)
    assert convert(vlm.model, vlm.processor, "transformers", tmp_path / "out").kind == "llava"
    monkeypatch.setattr("chiasm.interop.export.check.is_torchvision_available", lambda: False)
    with pytest.raises(ValueError, match="the processor that was written gives other pixel_values"):
        convert(vlm.model, vlm.processor, "transformers", tmp_path / "other")


def test_a_crop_is_cut_out_of_the_same_size() -> None:
    """Where 384 / (384 / 450) is a little less than 450."""
    images = ChiasmImageProcessor(384, [0.5] * 3, [0.5] * 3, "crop", 384 / 450)
    assert published_images(images).size["shortest_edge"] == 450 == images.shortest(384)


TILED: dict[str, dict[str, Any]] = {
    "clip": {"connector": "mlp"},
    "siglip": {"vision": "siglip", "connector": "linear", "features": {"layers": [-2]}, "language": "qwen2"},
    "preset": {"preset": "llava-1.5"},
}


@pytest.mark.parametrize("name", TILED)
def test_a_model_that_is_connected_in_tiles_becomes_llava_next(name: str, tmp_path: Path) -> None:
    """And answers about pictures of other shapes in one batch, by transformers alone."""
    vlm = connected(**TILED[name], tiles=[(1, 2), (2, 1), (2, 2)])
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path)
    assert done.kind == "llava_next" and done.difference is not None and done.difference < 1e-4
    theirs, words = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    shown = [tiny.picture(1), tiny.picture(2).resize((90, 20)), tiny.picture(3).resize((70, 70))]
    prompts = ["What is it?", "Which?", "Is it another one of those, or what?"]
    texts = [words.apply_chat_template(tiny.ask(prompt), add_generation_prompt=True) for prompt in prompts]
    batch = words(images=shown, text=texts, padding=True, return_tensors="pt")
    made = theirs.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    told = [one.strip() for one in words.batch_decode(made, skip_special_tokens=True)]
    assert told == [vlm.chat(*asked, max_new_tokens=5) for asked in zip(shown, prompts, strict=True)]
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    message = [{"role": "user", "content": [{"type": "image", "image": shown[1]}, {"type": "text", "text": "Which?"}]}]
    answer = ask(text=message, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer.strip() == told[1]
    again = chiasm.load(tmp_path)
    assert again.model.config.tiles == vlm.model.config.tiles
    assert [again.chat(*asked, max_new_tokens=5) for asked in zip(shown, prompts, strict=True)] == told


def test_a_placeholder_beyond_the_table_gets_a_row_that_is_never_chosen(tmp_path: Path) -> None:
    config = tiny.language().config
    config.vocab_size = 260
    vlm = chiasm.connect(tiny.vision(), type(tiny.language())(config), "mlp", tokenizer=tiny.tokenizer())
    assert vlm.model.config.image_token_id == 260
    convert(vlm.model, vlm.processor, "transformers", tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert theirs.get_input_embeddings().weight.shape[0] == 261
    inputs = vlm.processor(messages=QUESTION, images=tiny.picture())
    logits = theirs(**inputs).logits
    assert bool((logits[..., 260] < logits[..., :260].amax(dim=-1)).all())
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(theirs.generate(**inputs, **greedy), vlm.model.generate(**inputs, **greedy))


def test_settings_of_a_sampling_that_is_off_do_not_stop_a_save(tmp_path: Path) -> None:
    """Vicuna's. transformers saves them as they were published, and refuses once an end of turn or another is added."""
    tiny.language().save_pretrained(tmp_path / "words")
    told = {"temperature": 0.9, "top_p": 0.6, "length_penalty": 2.0, "eos_token_id": 250, "repetition_penalty": 1.2}
    (tmp_path / "words" / "generation_config.json").write_text(json.dumps(told))
    vlm = chiasm.connect(tiny.vision(), str(tmp_path / "words"), "mlp", tokenizer=tiny.tokenizer())
    vlm.save_pretrained(tmp_path / "mine")
    convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    for folder in ("mine", "out"):
        kept = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert kept["eos_token_id"] == [250, 257] and kept["repetition_penalty"] == 1.2
        assert not {"temperature", "top_p", "length_penalty"} & set(kept)


def test_the_pipeline_answers_as_chat_does(tmp_path: Path) -> None:
    vlm = connected(connector="mlp")
    convert(vlm.model, vlm.processor, "transformers", tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    message = {
        "role": "user",
        "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "What?"}],
    }
    answer = ask(text=[message], max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer.strip() == vlm.chat(tiny.picture(), "What?", max_new_tokens=6).strip()


def test_a_prefix_model_becomes_paligemma(tmp_path: Path) -> None:
    from chiasm.interop.paligemma import TEMPLATE

    gemma = AutoModelForCausalLM.from_config(test_paligemma.LANGUAGES["gemma"])
    prefix = {"connector": "linear", "attention": "prefix"}
    asked = {"tokenizer": tiny.tokenizer(), "chat_template": TEMPLATE}
    vlm = chiasm.connect(tiny.vision("siglip"), gemma, **asked, **prefix)
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path)
    assert done.kind == "paligemma" and done.difference is not None and done.difference < 1e-4
    other = chiasm.connect(tiny.vision("siglip"), gemma, tokenizer=tiny.tokenizer(), **prefix)
    with pytest.raises(ValueError, match="prompts are not PaliGemma's"):
        convert(other.model, other.processor, "transformers", tmp_path / "other")


@pytest.mark.parametrize(("family", "factor"), [("llama", 2), ("qwen2", 1)])
def test_siglip_with_pixel_shuffle_becomes_idefics3(family: str, factor: int, tmp_path: Path) -> None:
    """Several pictures in one prompt too, by transformers alone."""
    vision = test_idefics3.siglip()
    shuffle = {"name": "pixel_shuffle", "projection": "linear", "factor": factor}
    vlm = chiasm.connect(vision, tiny.language(family), shuffle, tokenizer=tiny.tokenizer())
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path)
    assert done.kind == "idefics3" and done.difference is not None and done.difference < 1e-4
    assert any("DeepSeek-VL" in note for note in done.notes)
    theirs, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    pictures = [tiny.picture(1), tiny.picture(2).resize((70, 21))]
    content = [{"type": "image", "image": one} for one in pictures] + [{"type": "text", "text": "What?"}]
    asked = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = theirs.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    text = vlm.processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    assert text == vlm.chat(pictures, "What?", max_new_tokens=5)
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    answer = ask(text=asked, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer.strip() == text
    again = chiasm.load(tmp_path).model.state_dict()
    ours = {name: tensor for name, tensor in vlm.model.state_dict().items() if not name.startswith("vision.model.head")}
    assert again.keys() == ours.keys() and all(
        torch.equal(again[name], ours[name]) for name in ours if "lm" not in name
    )


def test_internvl_keeps_its_processor(tmp_path: Path) -> None:
    """Its class for videos needs torchvision to be loaded, not to be written down."""
    test_internvl.with_processor(tmp_path)
    vlm = chiasm.load(tmp_path)
    assert "<IMG_CONTEXT>" in portable_template(vlm.processor)
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    assert done.difference is not None and done.difference < 1e-4
    assert is_torchvision_available() or any("torchvision" in note for note in done.notes)
    told = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert told["processor_class"] == "InternVLProcessor" and told["image_seq_length"] == 9
    assert told["video_processor"]["video_processor_type"] == "InternVLVideoProcessor"
    assert told["video_processor"]["size"] == told["image_processor"]["size"] == {"height": 24, "width": 24}
    inputs = vlm.processor(messages=QUESTION, images=probe_picture(vlm.model))
    found = chiasm.load(tmp_path / "out").processor(messages=QUESTION, images=probe_picture(vlm.model))
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)


def test_internvls_tokens_get_their_names(tmp_path: Path) -> None:
    """Those of a tokenizer that has the tokens alone."""
    test_internvl.with_processor(tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in told.items() if name not in test_internvl.TOKENS}
    kept.pop("model_specific_special_tokens", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
    vlm = chiasm.load(tmp_path)
    assert not hasattr(vlm.processor.tokenizer, "start_image_token")
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    assert done.difference is not None and done.difference < 1e-4
    named = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {name: named[name] for name in test_internvl.TOKENS} == test_internvl.TOKENS


def test_internvl_may_be_told_of_videos(tmp_path: Path) -> None:
    """Its processor wants a token for them, which the tokenizer of a model of pictures may lack."""
    test_internvl.with_processor(tmp_path / "first", videos=False)
    vlm = chiasm.load(tmp_path / "first")
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    assert done.difference is not None and done.difference < 1e-4
    theirs, words = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForImageTextToText, AutoTokenizer))
    rows = theirs.get_input_embeddings().weight.shape[0]
    assert words.video_token == "<video>" and max(words("<video> <image>")["input_ids"]) < rows == len(words)
    assert set(range(vlm.model.config.text_config.vocab_size, rows)) <= set(theirs.generation_config.suppress_tokens)
    again = chiasm.load(tmp_path / "out")
    for prompt in ("Is <video> a token?", "What is it?"):
        assert isinstance(again.chat(tiny.picture(), prompt, max_new_tokens=4), str)
    assert again.chat(tiny.picture(), prompt, max_new_tokens=4) == vlm.chat(tiny.picture(), prompt, max_new_tokens=4)
    processor = KINDS["internvl"].export(vlm.model, vlm.processor).processor
    with pytest.raises(ValueError, match="Found 1 <video> tokens in the text but no videos were passed"):
        processor(text="Is <video> a token?")


def test_qwen2_vl_keeps_its_processor(tmp_path: Path) -> None:
    """Pictures of any shape; its class for videos needs torchvision too."""
    test_unified_loaders.qwen2_vl_with_processor(tmp_path / "first")
    vlm = chiasm.load(tmp_path / "first")
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    assert done.kind == "qwen2_vl" and done.difference is not None and done.difference < 1e-4
    assert is_torchvision_available() or any("torchvision" in note for note in done.notes)
    exported, again = KINDS["qwen2_vl"].export(vlm.model, vlm.processor), chiasm.load(tmp_path / "out")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for picture in (tiny.picture(), tiny.picture(1).resize((70, 33))):
        inputs = exported.ask(exported.processor, QUESTION, picture)
        tokens = theirs.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = vlm.chat(picture, "What is it?", max_new_tokens=5)
        assert exported.processor.decode(tokens, skip_special_tokens=True).strip() == text
        assert again.chat(picture, "What is it?", max_new_tokens=5) == text


@pytest.mark.parametrize("tied", [True, False])
def test_from_the_command_line(tied: bool, tmp_path: Path) -> None:
    """Odd sizes, added words, bfloat16 and adapters that are not merged."""
    words = tiny.tokenizer()
    words.add_tokens(["<one>", "<two>"])
    sizes = {"hidden_size": 42, "intermediate_size": 51, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257}
    language = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=tied, initializer_range=0.3))
    language.resize_token_embeddings(len(words))
    vlm = chiasm.connect(tiny.vision(), language, "mlp", tokenizer=words)
    vlm.model.to(torch.bfloat16)
    add_adapter(vlm.model, "language", rank=2)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    vlm.save_pretrained(tmp_path / "mine")
    asked = ["convert", str(tmp_path / "mine"), "--to", "transformers", "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kind"] == "llava"
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    assert (theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()) == tied
    ask = pipeline("image-text-to-text", model=str(tmp_path / "out"))
    message = {
        "role": "user",
        "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "<one> What?"}],
    }
    answer = ask(text=[message], max_new_tokens=3, do_sample=False, return_full_text=False)[0]["generated_text"]
    merged_vlm = chiasm.load(tmp_path / "out")
    assert answer.strip() == merged_vlm.chat(tiny.picture(), "<one> What?", max_new_tokens=3).strip()


def test_adapters_are_merged_in_a_copy(tmp_path: Path) -> None:
    vlm = connected(connector="mlp")
    add_adapter(vlm.model, "language", rank=2)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path)
    assert done.difference is not None and done.difference < 1e-4 and vlm.model.config.adapters


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "coordinates": ({"vision": "convnext", "connector": "mlp"}, "appends coordinates .* patch_positions='none'"),
    "no counterpart": ({"connector": tiny.connector("c_abstractor")}, "connector 'c_abstractor'; with this fusion"),
    "depth": ({"connector": {"name": "mlp", "depth": 3}}, "has depth 3, LLaVA's projector has 2"),
    "width": ({"connector": {"name": "mlp", "width": 99}}, "inner width of 99"),
    "encoder": ({"connector": "pixel_shuffle"}, "InternVL has an encoder of its own"),
    "encoder, one matrix": (
        {"connector": {"name": "pixel_shuffle", "projection": "linear"}},
        "Idefics3's encoder is SigLIP's, this one is of type 'clip_vision_model'",
    ),
    "blocks at the edge": (
        {"vision": "siglip", "connector": {"name": "pixel_shuffle", "projection": "linear"}},
        "scale_factor=2, which does not divide its 3 patches a side",
    ),
    "queries": ({"connector": tiny.connector("qformer")}, "BLIP-2 has an encoder of its own"),
    "regions": ({"connector": "mlp", "regions": (3, 3)}, "names of"),
    "tiles": (
        {"connector": "avg_pool", "tiles": [(1, 2)]},
        "connector 'avg_pool: tiles'; with this fusion it has connectors .*linear: tiles",
    ),
    "tiles in both directions": (
        {"vision": "siglip", "connector": "linear", "attention": "prefix", "tiles": [(1, 2)]},
        "attention 'prefix' and connector 'linear: tiles'",
    ),
    "blocks": (
        {"fusion": "intermediate", "connector": tiny.connector("perceiver_resampler", project=False)},
        "Idefics",
    ),
    "prefix tokens": ({"vision": "dinov2", "connector": "mlp"}, "LLaVA cannot read the features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    vlm = connected(**options)
    with pytest.raises(ValueError, match=message) as refusal:
        convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_every_route_leads_to_a_kind() -> None:
    assert set(ROUTES.values()) == set(KINDS)
    vlm = connected(connector="mlp")
    with pytest.raises(ValueError, match="--to 'ollama' is unknown"):
        convert(vlm.model, vlm.processor, "ollama", Path("nowhere"))
    with pytest.raises(ValueError, match="--quantize is for --to gguf"):
        convert(vlm.model, vlm.processor, "onnx", Path("nowhere"), quantize="q8_0")
    with pytest.raises(ValueError, match="--inexact is for --to gguf"):
        convert(vlm.model, vlm.processor, "onnx", Path("nowhere"), inexact=True)


@pytest.mark.parametrize("there", [False, True])
def test_a_conversion_is_whole_or_leaves_nothing(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, out = connected(connector="mlp"), tmp_path / "out"
    if there:
        out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("chiasm.interop.export.check.CLOSE", -1.0)
        with pytest.raises(ValueError, match="the checkpoint gives other logits than the model") as told:
            chiasm.api.convert(vlm, "transformers", out)
    assert str(tmp_path) not in str(told.value)
    assert list(tmp_path.rglob("*")) == ([out] if there else [])
    done = chiasm.api.convert(vlm, "transformers", out)
    assert done.folder == out and (out / "config.json").is_file() and list(tmp_path.iterdir()) == [out]
    with pytest.raises(FileExistsError, match="is not empty"):
        chiasm.api.convert(vlm, "transformers", out)


def test_files_that_are_not_compared_need_no_option_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="GGUF files are for models that answer"):
        convert(tiny.vision(), None, "gguf", tmp_path / "out", check=False)


def test_the_table_of_the_guide_is_current() -> None:
    table = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "convert_table.py"))
    assert table["PAGE"].read_text() == table["page"](), "run docs/convert_table.py --write"
