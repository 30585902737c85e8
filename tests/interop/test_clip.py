"""CLIP and SigLIP checkpoints of transformers: embeddings and logits equal, and back without a difference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

import chiasm
import chiasm.api
import contracts
import tiny
from chiasm.fusion.adapters import adapter_parameters, add_adapter
from chiasm.interop.clip import export_late
from chiasm.interop.export.check import check_late
from chiasm.vision.image_processor import ChiasmImageProcessor

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
END = 257
VISION = {
    "hidden_size": 28,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 35,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 261,
    "max_position_embeddings": 13,
    "pad_token_id": 258,
    "bos_token_id": 256,
}


def clip(eos: int = END) -> CLIPModel:
    config = CLIPConfig(
        text_config=CLIPTextConfig(**TEXT, eos_token_id=eos).to_dict(),
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        projection_dim=17,
        logit_scale_init_value=1.3,
    )
    return CLIPModel(config)


def siglip() -> SiglipModel:
    config = SiglipConfig(
        text_config=SiglipTextConfig(**TEXT, projection_size=28).to_dict(),
        vision_config=SiglipVisionConfig(**VISION).to_dict(),
    )
    return SiglipModel(config)


MAKERS = {"clip": clip, "clip-legacy": lambda: clip(eos=2), "siglip": siglip}


def make(kind: str, folder: Path) -> PreTrainedModel:
    """A reference model whose every weight matters, saved in a folder."""
    torch.manual_seed(0)
    model = MAKERS[kind]().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.15)
    model.save_pretrained(folder)
    return model


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Four texts of different lengths and three pictures."""
    torch.manual_seed(1)
    ids = torch.randint(3, 256, (4, 13))
    mask = torch.ones_like(ids)
    for row, length in enumerate((13, 9, 4, 2)):
        ids[row, length - 1 :] = END
        mask[row, length:] = 0
    given = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 35, 35)}
    return given if kind == "siglip" else {**given, "attention_mask": mask}


@pytest.mark.parametrize("kind", MAKERS)
def test_scores_equal_the_reference(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    ours = chiasm.load(tmp_path)
    assert isinstance(ours, chiasm.DualEncoder)
    with torch.no_grad():
        expected, found = theirs(**inputs(kind)), ours.model(**inputs(kind))
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **CLOSE)
    pairs = {name: tensor[:3] for name, tensor in inputs(kind).items()}
    with torch.no_grad():
        expected, found = (model(**pairs, return_loss=True) for model in (theirs, ours.model))
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    with pytest.raises(ValueError, match=r"for pairs, got 3 picture\(s\) and 4 text\(s\)"):
        ours.model(**inputs(kind), return_loss=True)
    with pytest.raises(ValueError, match="no processor"):
        ours.score(tiny.picture(), "a cat")


@pytest.mark.parametrize("kind", MAKERS)
def test_there_and_back_is_exact(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path / "theirs")
    ours = chiasm.load(tmp_path / "theirs")
    export_late(ours.model, None, tmp_path / "back")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    again = AutoModel.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert torch.equal(again(**inputs(kind)).logits_per_image, theirs(**inputs(kind)).logits_per_image)
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        saved = chiasm.load(tmp_path / "ours").model(**inputs(kind)).logits_per_image
        assert torch.equal(saved, ours.model(**inputs(kind)).logits_per_image)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_files_of_both_processors_agree(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "theirs")
    tiny.tokenizer(None).save_pretrained(tmp_path / "theirs")
    mode = {"clip": "crop", "siglip": "squash"}[kind]
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    ChiasmImageProcessor(35, mean, std, mode).save_pretrained(tmp_path / "theirs")
    ours = chiasm.load(tmp_path / "theirs")
    given = ours.processor(images=[tiny.picture()], text=["a cat", "a much longer text than thirteen bytes"])
    assert given["input_ids"].shape == (2, 13) and ("attention_mask" in given) == (kind == "clip")
    assert ours.score(tiny.picture(), ["a cat", "dogs"]).shape == (1, 2)
    export_late(ours.model, ours.processor, tmp_path / "back")
    again = chiasm.load(tmp_path / "back")
    assert torch.equal(again.score(tiny.picture(), ["a cat"]), ours.score(tiny.picture(), ["a cat"]))
    if kind == "clip":
        reference = CLIPImageProcessor.from_pretrained(tmp_path / "back")
        pixels = reference(tiny.picture(), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels, given["pixel_values"], rtol=0, atol=0.03)


@pytest.mark.parametrize("how", ["loaded", "anew"])
@pytest.mark.parametrize(("kind", "fraction"), [("clip", 0.9), ("clip", 1.0), ("siglip", 0.9)])
def test_their_processor_gives_our_inputs(kind: str, fraction: float, how: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "theirs")
    tiny.tokenizer(None).save_pretrained(tmp_path / "theirs")
    ChiasmImageProcessor(35, [0.5] * 3, [0.5] * 3, crop_fraction=fraction).save_pretrained(tmp_path / "theirs")
    folder = str(tmp_path / "theirs")
    connector = {"clip": {"name": "linear", "space": 9}, "siglip": {"name": "none", "logit_bias": -10.0}}[kind]
    ours = chiasm.load(folder) if how == "loaded" else chiasm.connect(folder, folder, connector, fusion="late")
    assert isinstance(ours, chiasm.DualEncoder)
    chiasm.api.convert(ours, "transformers", tmp_path / "out")
    picture, texts = tiny.picture(2).resize((171, 90)), ["A Cat", "two Dogs and more " * 3]
    theirs, filled = AutoProcessor.from_pretrained(tmp_path / "out"), True if kind == "clip" else "max_length"
    given = theirs(images=[picture], text=texts, padding=filled, truncation=True, return_tensors="pt")
    wanted = ours.processor(images=[picture], text=texts)
    assert given.keys() == wanted.keys() and torch.equal(given["input_ids"], wanted["input_ids"])
    torch.testing.assert_close(given["pixel_values"], wanted["pixel_values"], rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_another_processor_does_not_pass_the_check(name: str, tmp_path: Path) -> None:
    make("clip", tmp_path / "theirs")
    tiny.tokenizer(None).save_pretrained(tmp_path / "theirs")
    ChiasmImageProcessor(35, [0.5] * 3, [0.5] * 3, crop_fraction=0.9).save_pretrained(tmp_path / "theirs")
    ours = chiasm.load(tmp_path / "theirs")
    export_late(ours.model, ours.processor, tmp_path / "out")
    assert check_late(tmp_path / "out", ours.model, ours.processor) < 1e-4
    path = tmp_path / "out" / name
    settings = json.loads(path.read_text())
    settings |= {"model_max_length": 9} if name.startswith("token") else {"size": {"shortest_edge": 39}}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the processor that was written gives other"):
        check_late(tmp_path / "out", ours.model, ours.processor)


def test_a_tokenizer_without_words_is_none(tmp_path: Path) -> None:
    make("clip", tmp_path)
    ChiasmImageProcessor(35, [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no processor"):
        chiasm.load(tmp_path).embed_texts("a cat")


def test_siglip_reads_lower_case(tmp_path: Path) -> None:
    make("siglip", tmp_path)
    tiny.tokenizer(None).save_pretrained(tmp_path)
    ChiasmImageProcessor(35, [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path)
    ours = chiasm.load(tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    made = chiasm.connect(str(tmp_path), str(tmp_path), {"name": "none", "logit_bias": -10.0}, fusion="late")
    for encoder in (ours, made, chiasm.load(tmp_path / "ours")):
        assert torch.equal(encoder.embed_texts("A Cat"), encoder.embed_texts("a cat"))


@pytest.mark.parametrize("kind", MAKERS)
def test_weights_are_read_strictly(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    contracts.check_strict_loading(tmp_path)


def test_half_understood_checkpoints_are_refused(tmp_path: Path) -> None:
    make("clip", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_model.final_layer_norm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no value in the checkpoint: 'language.final_layer_norm.bias'"):
        chiasm.load(tmp_path)


def test_a_siglip_without_its_pooling_head_is_refused(tmp_path: Path) -> None:
    config = siglip().config
    config.vision_config.vision_use_head = False
    theirs = SiglipModel(config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AttributeError):
        theirs(**inputs("siglip"))
    with pytest.raises(ValueError, match=r"is a SigLIP without the head .* \(vision_use_head: false in its config"):
        chiasm.load(tmp_path)
    tiny.tokenizer(None).save_pretrained(tmp_path)
    pooling = {"vision": "mean"}
    made = chiasm.connect(str(tmp_path), str(tmp_path), "linear", fusion="late", pooling=pooling)
    assert made.model(**inputs("siglip")).logits_per_image.shape == (3, 4)


def test_what_transformers_has_no_class_for_is_refused(tmp_path: Path) -> None:
    other = chiasm.connect(tiny.vision(), tiny.language(), fusion="late").model
    with pytest.raises(ValueError, match="no class for late fusion of clip_vision_model and llama"):
        export_late(other, None, tmp_path)
    towers: dict[str, Any] = {"vision": make("clip", tmp_path / "clip"), "language": clip()}
    biased = chiasm.connect(**towers, connector={"name": "linear", "bias": True}, fusion="late").model
    with pytest.raises(ValueError, match="with projections 'linear'"):
        export_late(biased, None, tmp_path)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_their_towers_connect_anew_and_go_back(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "theirs")
    tiny.tokenizer(None).save_pretrained(tmp_path / "theirs")
    folder = str(tmp_path / "theirs")
    connector = {"clip": {"name": "linear", "space": 9}, "siglip": {"name": "none", "logit_bias": -10.0}}[kind]
    made = chiasm.connect(folder, folder, connector, fusion="late")
    assert made.model.config.vision_pooling == made.model.config.text_pooling == "own"
    back = export_late(made.model, None, tmp_path / "back")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "back").eval()(**inputs(kind)).logits_per_image
        assert torch.equal(back(**inputs(kind)).logits_per_image, expected)
        torch.testing.assert_close(made.model(**inputs(kind)).logits_per_image, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_verb_converts_with_adapters_and_checks(kind: str, run: Any, tmp_path: Path) -> None:
    make(kind, tmp_path / "theirs")
    tiny.tokenizer(None).save_pretrained(tmp_path / "theirs")
    ChiasmImageProcessor(35, [0.5] * 3, [0.5] * 3, "squash").save_pretrained(tmp_path / "theirs")
    ours = chiasm.load(tmp_path / "theirs")
    add_adapter(ours.model, "language", rank=3)
    for name in adapter_parameters(ours.model):
        torch.nn.init.normal_(ours.model.get_parameter(name), std=0.2)
    ours.save_pretrained(tmp_path / "ours")
    code, out, err = run("convert", tmp_path / "ours", "--to", "transformers", "-o", tmp_path / "back")
    assert code == 0 and "its logits differ by" in out, err
    back = AutoModel.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        found, expected, before = (
            model(**inputs(kind)).logits_per_image
            for model in (back, ours.model, chiasm.load(tmp_path / "theirs").model)
        )
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - before).abs().max() > 1e-3


def test_a_wrong_folder_does_not_pass_the_check(tmp_path: Path) -> None:
    make("clip", tmp_path / "theirs")
    ours = chiasm.load(tmp_path / "theirs").model
    assert check_late(tmp_path / "theirs", ours) < 1e-4
    with torch.no_grad():
        ours.connector.logit_scale += 0.01
    with pytest.raises(ValueError, match="gives other logits than the model"):
        check_late(tmp_path / "theirs", ours)


def test_nothing_is_written_of_a_model_that_does_not_fit(tmp_path: Path) -> None:
    make("clip", tmp_path / "theirs")
    tiny.tokenizer(None).save_pretrained(tmp_path / "theirs")
    ChiasmImageProcessor(35, [0.5] * 3, [0.5] * 3, "pad").save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="do not pad to 35×35; use squash"):
        chiasm.api.convert(tmp_path / "theirs", "transformers", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    towers = clip().vision_model, clip().text_model
    wide = chiasm.connect(*towers, {"name": "linear", "space": 9}, "late", image_size=(49, 35))
    with pytest.raises(ValueError, match=r"stretched to 49×35 pixels, .* connect with a square image_size"):
        chiasm.api.convert(wide, "transformers", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_parts_of_different_precision_pass_the_check(tmp_path: Path) -> None:
    make("clip", tmp_path / "theirs")
    ours = chiasm.load(tmp_path / "theirs")
    ours.model.vision.to(torch.bfloat16)
    done = chiasm.api.convert(ours, "transformers", tmp_path / "back")
    assert done.difference is not None and 1e-4 < done.difference < 0.1
