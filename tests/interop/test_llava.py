"""A transformers LLaVA checkpoint gives the same logits and the same text here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    PhiConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import chiasm
import tiny
from chiasm.interop.convert import convert
from chiasm.interop.loaders import name_parts
from chiasm.training.card import model_card
from contracts import check_equals_reference, check_saved_equals_loaded, check_strict_loading

TOKENS = {"vocab_size": 261, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
LAYERS = {"intermediate_size": 52, "num_hidden_layers": 2, "num_key_value_heads": 2}
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def reference(
    folder: Path, tower: str = "clip", language: str = "llama", **changes: Any
) -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 5}
    settings: dict[str, Any] = {
        "vision_config": TOWERS[tower](**sizes, image_size=35, patch_size=7),
        "text_config": tiny.language(language).config,
        "image_token_index": 260,
    }
    torch.manual_seed(3)
    llava = LlavaForConditionalGeneration(LlavaConfig(**settings | changes)).eval()
    llava.save_pretrained(folder)
    return llava


def pictures(llava: LlavaForConditionalGeneration, rows: int = 2) -> dict[str, torch.Tensor]:
    """One row with a picture, the others with two."""
    size = llava.config.vision_config.image_size
    pixels = torch.randn(2 * rows - 1, 3, size, size)
    with torch.no_grad():
        features = llava.get_image_features(
            pixels,
            vision_feature_layer=llava.config.vision_feature_layer,
            vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        )
    tokens = features.pooler_output[0].shape[0]
    ids = torch.randint(0, 255, (rows, 2 * tokens + 11))
    ids[:, 3 : 3 + tokens] = 260
    ids[1:, 5 + tokens : 5 + 2 * tokens] = 260
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, -1, [-2], [1, -2, 0]])
def test_towers_strategies_and_layers(tower: str, strategy: str, layer: Any, tmp_path: Path) -> None:
    llava = reference(tmp_path, tower, vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    check_equals_reference(chiasm.load(tmp_path).model, llava, pictures(llava))


@pytest.mark.parametrize("language", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "silu"), (True, "gelu_pytorch_tanh")])
def test_languages_and_projectors(language: str, bias: bool, activation: str, tmp_path: Path) -> None:
    options = {"multimodal_projector_bias": bias, "projector_hidden_act": activation}
    llava = reference(tmp_path, language=language, **options)
    vlm = chiasm.load(tmp_path)
    inputs = pictures(llava)
    check_equals_reference(vlm.model, llava, inputs)
    check_saved_equals_loaded(vlm, inputs)
    assert not any(isinstance(module, LlavaForConditionalGeneration) for module in vlm.model.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(tied: bool, tmp_path: Path) -> None:
    llava = reference(tmp_path, tie_word_embeddings=tied)
    model = chiasm.load(tmp_path).model
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    check_equals_reference(model, llava, pictures(llava, rows=3))


def test_weights_are_read_strictly(tmp_path: Path) -> None:
    reference(tmp_path)
    check_strict_loading(tmp_path)


def test_left_padding_and_text_alone(tmp_path: Path) -> None:
    llava = reference(tmp_path)
    model, inputs = chiasm.load(tmp_path).model, pictures(llava)
    inputs["input_ids"][0, :3] = 258
    inputs["attention_mask"][0, :3] = 0
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258, "suppress_tokens": [260]}
    assert torch.equal(model.generate(**inputs, **greedy), llava.generate(**inputs, **greedy))
    ids = torch.randint(0, 255, (2, 9))
    check_equals_reference(model, llava, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_a_language_model_whose_head_has_a_bias(tmp_path: Path) -> None:
    """LLaVA's own head has none."""
    text = PhiConfig(**TOKENS, hidden_size=48, num_attention_heads=6, partial_rotary_factor=0.5, **LAYERS)
    llava = reference(tmp_path / "first", text_config=text)
    vlm, inputs = chiasm.load(tmp_path / "first"), pictures(llava)
    check_equals_reference(vlm.model, llava, inputs)
    check_saved_equals_loaded(vlm, inputs)
    done = convert(vlm.model, None, "transformers", tmp_path / "out")
    assert done.difference is not None and done.difference < 1e-4
    state = {older(name): value.clone() for name, value in llava.state_dict().items()}
    state["language_model.lm_head.bias"] = torch.ones(llava.lm_head.weight.shape[0])
    save_file(state, tmp_path / "first" / "model.safetensors")
    vlm = chiasm.load(tmp_path / "first")
    assert bool((vlm.model.get_output_embeddings().bias == 1).all())
    with pytest.raises(ValueError, match="head of this 'phi' language model has a bias, the one of a LLaVA checkpoint"):
        convert(vlm.model, None, "transformers", tmp_path / "other")


@pytest.mark.parametrize("tower", [ViTConfig, Dinov2Config])
def test_towers_that_are_written_by_older_names(tower: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 5}
    llava = reference(tmp_path / "first", vision_config=tower(**sizes, image_size=35, patch_size=7))
    names = load_file(tmp_path / "first" / "model.safetensors")
    assert any(".attention.attention.query." in name for name in names)
    vlm = chiasm.load(tmp_path / "first")
    check_equals_reference(vlm.model, llava, pictures(llava))
    convert(vlm.model, None, "transformers", tmp_path / "out")
    back = chiasm.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in vlm.model.state_dict().items())
    weights = load_file(tmp_path / "first" / "model.safetensors")
    name = next(name for name in weights if name.endswith("attention.query.weight"))
    twin = name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
    save_file(
        weights | {twin: weights[name].clone()}, tmp_path / "first" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="both become"):
        chiasm.load(tmp_path / "first")


def test_experts_are_joined(tmp_path: Path) -> None:
    text = MixtralConfig(**TOKENS, hidden_size=36, num_attention_heads=6, num_local_experts=3, **LAYERS)
    llava = reference(tmp_path, text_config=text)
    weights = load_file(tmp_path / "model.safetensors")
    check_equals_reference(chiasm.load(tmp_path).model, llava, pictures(llava))
    weights.pop(next(name for name in weights if ".experts.1.w3." in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"become '.*experts\.gate_up_proj' do not fit together"):
        chiasm.load(tmp_path)


def current(name: str) -> str:
    return name


def older(name: str) -> str:
    """Before v4.52, and with the level that the towers then had."""
    name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.")
    return f"language_model.{name}" if name.startswith("lm_head") else name


@pytest.mark.parametrize("names", [current, older])
@pytest.mark.parametrize("tied", [False, True])
def test_names_of_every_version(names: Any, tied: bool, tmp_path: Path) -> None:
    llava = reference(tmp_path, tie_word_embeddings=tied)
    state = {names(name): value.clone() for name, value in llava.state_dict().items()}
    save_file(
        state | {"vision_tower.vision_model.embeddings.position_ids": torch.arange(26)}, tmp_path / "model.safetensors"
    )
    check_equals_reference(chiasm.load(tmp_path).model, llava, pictures(llava))


def test_shards_and_precision(tmp_path: Path) -> None:
    llava = reference(tmp_path)
    llava.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "model.safetensors").unlink()
    assert chiasm.load(tmp_path).model.dtype == torch.bfloat16
    model = chiasm.load(tmp_path, dtype=torch.float32).model
    check_equals_reference(model, llava.float(), pictures(llava))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_hidden_act": "gelus"}, "activation='gelus', which is unknown"),
        ({"vision_feature_layer": 9}, "layer 9 does not exist; this encoder returns 5 hidden states"),
        ({"multimodal_projector_bias": False}, r"2 weights have no place .*'multi_modal_projector\.linear_1\.bias'"),
    ],
)
def test_a_setting_that_does_not_fit_is_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        chiasm.load(tmp_path)


def test_a_missing_weight_is_told(tmp_path: Path) -> None:
    reference(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("multi_modal_projector.linear_2.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no value in the checkpoint: 'connector\.layers\.1\.bias'"):
        chiasm.load(tmp_path)


def theirs(folder: Path, **options: Any) -> LlavaProcessor:
    tokenizer = tiny.tokenizer(None)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessorPil(size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35})
    options = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1} | options
    processor = LlavaProcessor(images, tokenizer, chat_template=TEMPLATE, **options)
    processor.save_pretrained(folder)
    return processor


def test_the_processor_gives_the_same_inputs(tmp_path: Path) -> None:
    reference(tmp_path)
    processor = theirs(tmp_path)
    vlm = chiasm.load(tmp_path)
    expected = processor(images=tiny.picture(), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    found = vlm.processor(images=tiny.picture(), text="USER: <image>\nWhat? ASSISTANT:")
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    messages = tiny.ask("What?")
    assert torch.equal(vlm.processor(messages=messages, images=tiny.picture())["input_ids"], expected["input_ids"])
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert vlm.processor.apply_chat_template(messages, add_generation_prompt=True) == rendered
    assert isinstance(vlm.chat(tiny.picture(), "What?", max_new_tokens=3), str)


def test_its_card_names_the_whole_checkpoint(tmp_path: Path) -> None:
    """And not what the language model in it once was."""
    text = tiny.language().config
    text._name_or_path = "lmsys/vicuna-tiny"
    reference(tmp_path / "llava-tiny", text_config=text)
    vlm = chiasm.load(tmp_path / "llava-tiny")
    assert "- llava-tiny (llama)" in model_card(vlm.model, [], {})
    name_parts(vlm.model, "llava-hf/llava-tiny")
    vlm.save_pretrained(tmp_path / "mine")
    for one in (vlm, chiasm.load(tmp_path / "mine")):
        assert ModelCard(model_card(one.model, [], {})).data.base_model == ["llava-hf/llava-tiny"]


def test_templates_may_have_names(tmp_path: Path) -> None:
    reference(tmp_path)
    named = theirs(tmp_path).tokenizer
    named.chat_template = {"default": TEMPLATE, "other": TEMPLATE + " "}
    named.save_pretrained(tmp_path)
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert isinstance(chiasm.load(tmp_path).chat(tiny.picture(), "What?", max_new_tokens=3), str)


def test_a_picture_may_have_another_token(tmp_path: Path) -> None:
    text = tiny.language().config.to_dict() | {"vocab_size": 262}
    reference(tmp_path / "first", image_token_index=261, text_config=text)
    tokenizer = tiny.tokenizer(None)
    tokenizer.add_tokens(["<image>", "<pic>"], special_tokens=True)
    template = TEMPLATE.replace("<image>", "<pic>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35})
    options = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer, chat_template=template, image_token="<pic>", **options)
    processor.save_pretrained(tmp_path / "first")
    vlm = chiasm.load(tmp_path / "first")
    prompt = processor.apply_chat_template(tiny.ask("What?"), add_generation_prompt=True)
    expected = processor(images=tiny.picture(), text=prompt, return_tensors="pt")
    found = vlm.processor(messages=tiny.ask("What?"), images=tiny.picture())
    assert torch.equal(found["input_ids"], expected["input_ids"])
    convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert again.apply_chat_template(tiny.ask("What?"), add_generation_prompt=True) == prompt


def test_without_processor_files_only_the_processor_is_missing(tmp_path: Path) -> None:
    reference(tmp_path)
    vlm = chiasm.load(tmp_path)
    with pytest.raises(ValueError, match="no processor"):
        vlm.chat(tiny.picture(), "What?")


HEADS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 10, "sliding_window": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 10},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("family", HEADS)
def test_the_reference_neither_scales_nor_caps_logits(family: str, tmp_path: Path) -> None:
    text = tiny.language("llama").config.to_dict()
    sizes = {name: text[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 258, "eos_token_id": 257}
    llava = reference(tmp_path, text_config=AutoConfig.for_model(family, **sizes, **HEADS[family]))
    vlm, inputs = chiasm.load(tmp_path), pictures(llava)
    check_equals_reference(vlm.model, llava, inputs)
    check_saved_equals_loaded(vlm, inputs)
    assert vlm.model.config.direct_head
