"""GGUF files answer in llama.cpp what Chiasm answers."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_idefics3
import torch
from gguf import GGUFReader
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Idefics3Processor,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import chiasm
import tiny
from chiasm.interop.convert import convert

FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def model(
    family: str = "llama",
    connector: Any = "mlp",
    tied: bool = False,
    size: int = 64,
    shown: int | None = None,
    **more: Any,
) -> chiasm.VLM:
    """Sizes are multiples of 32, which quantised rows need; pictures are shown in another than the encoder's."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = SiglipVisionModel(
        SiglipVisionConfig(**sizes, image_size=size, patch_size=size // (24 if size > 64 else 4))
    )
    for parameter in vision.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens = {"vocab_size": 261, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    text = {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3, "tie_word_embeddings": tied}
    config = FAMILIES[family](**sizes, **tokens, **text | more, max_position_embeddings=2048)
    language = AutoModelForCausalLM.from_config(config)
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "image_size": shown}
    vlm = chiasm.connect(vision.eval(), language.eval(), connector, **options)
    vlm.model.connector.output.weight.data.mul_(2)
    return vlm


NEAR: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


def small(family: str, **options: Any) -> Any:
    """A language model of width 36 with settings that llama.cpp may not have."""
    text = tiny.language("llama").config
    sizes = {name: getattr(text, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"vocab_size": 261, "num_attention_heads": 6, "num_key_value_heads": 2, "eos_token_id": 257}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **options))


LLAMA_CPP = """
import json, sys, xllamacpp
folder, questions, tokens = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path = folder + "/model.gguf", folder + "/mmproj.gguf"
params.n_ctx, params.n_parallel, params.n_gpu_layers = 2048, 1, 0
params.warmup = params.mmproj_use_gpu = params.fit_params = False
params.cpuparams.n_threads, params.verbosity = 1, 0
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
asked = ({"messages": [{"role": "user", "content": c}], "max_tokens": tokens, "temperature": 0} for c in questions)
answers = [server.handle_chat_completions(one)["choices"][0]["message"]["content"] for one in asked]
print("ANSWERS" + json.dumps(answers), flush=True)
"""
"""llama.cpp's server in a process of its own, in float32 and on one thread."""


def answers(folder: Path, pictures: list[Image.Image | None], prompt: str, tokens: int) -> list[str]:
    pytest.importorskip("xllamacpp")
    questions = []
    for picture in pictures:
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if picture is not None:
            file = io.BytesIO()
            picture.save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        questions.append(content)
    given = json.dumps([str(folder), questions, tokens])
    run = subprocess.run([sys.executable, "-c", LLAMA_CPP], input=given, capture_output=True, text=True, timeout=120)
    assert "ANSWERS" in run.stdout, run.stderr[-2000:]
    return json.loads(run.stdout.split("ANSWERS", 1)[1].splitlines()[0])


def sure(vlm: chiasm.VLM, picture: Image.Image | None) -> int:
    """Tokens up to the first whose score is as good as another's: llama.cpp's GELU is a table in half precision."""
    inputs = vlm.processor(messages=tiny.ask("What is it?", picture is not None), images=picture and [picture])
    options = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    best = torch.stack(vlm.model.generate(**inputs, **options).scores)[:, 0].topk(2).values
    close = (best[:, 0] - best[:, 1] < 0.05).nonzero()
    return int(close[0]) if len(close) else len(best)


@pytest.mark.parametrize(
    ("family", "connector", "tied", "size", "shown"),
    [
        ("llama", "mlp", False, 64, None),
        ("qwen2", "linear", True, 64, None),
        ("qwen3", "mlp", False, 64, None),
        ("llama", "ldp", False, 336, None),
        ("llama", "mlp", False, 64, 112),
    ],
)
def test_llama_cpp_gives_the_same_text(
    family: str, connector: str, tied: bool, size: int, shown: int | None, tmp_path: Path
) -> None:
    vlm, size = model(family, connector, tied, size, shown), shown or size
    convert(vlm.model, vlm.processor, "gguf", tmp_path)
    pictures = [None, tiny.picture(3).resize((size, size)), tiny.picture(5).resize((size, size))]
    found = answers(tmp_path, pictures, "What is it?", 8)
    lengths = [sure(vlm, picture) for picture in pictures]
    assert sum(lengths) >= 8 and sum(lengths[1:]) >= 3
    for picture, text, length in zip(pictures, found, lengths, strict=True):
        if length:
            expected = vlm.chat(picture, "What is it?", max_new_tokens=length)
            assert text.startswith(expected.rstrip("\ufffd"))


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 100.0, "factor": 5.0}


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR])
def test_heads_turn_as_far_in_llama_cpp(rope: dict[str, Any], tmp_path: Path) -> None:
    vlm = model(rope_parameters=rope)
    plain = model(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    pictures = [None, *(tiny.picture(seed).resize((64, 64)) for seed in (3, 5, 7, 8, 11))]
    lengths = [sure(vlm, picture) for picture in pictures]
    shown = list(zip(pictures, lengths, strict=True))
    expected, others = (
        [one.chat(picture, "What is it?", max_new_tokens=max(length, 1)) for picture, length in shown]
        for one in (vlm, plain)
    )
    assert expected != others and sum(lengths) >= 8
    convert(vlm.model, vlm.processor, "gguf", tmp_path)
    for text, told, length in zip(answers(tmp_path, pictures, "What is it?", 8), expected, lengths, strict=True):
        assert not length or text.startswith(told.rstrip("\ufffd"))


def smooth(seed: int) -> Image.Image:
    """A picture of soft colours, as photographs have them."""
    colours = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(colours, size=(64, 64), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).to(torch.uint8).numpy())


def greedy_to_say_image(tied: bool) -> chiasm.VLM:
    """A model whose placeholder, which has a row of its own, would win every step that does not suppress it."""
    vlm = model(tied=tied)
    head = vlm.model.get_output_embeddings().weight.data
    token = vlm.model.config.image_token_id
    assert token < len(head)
    head[token] = 3 * head[:token].abs().amax() * torch.sign(head[token])
    return vlm


@pytest.mark.parametrize("tied", [False, True])
def test_the_placeholder_is_never_the_likeliest(tied: bool, tmp_path: Path) -> None:
    vlm = greedy_to_say_image(tied)
    convert(vlm.model, vlm.processor, "gguf", tmp_path)
    tensors = {one.name: one.data for one in GGUFReader(tmp_path / "model.gguf").tensors}
    token = vlm.model.config.image_token_id
    head = torch.tensor(tensors["token_embd.weight" if tied else "output.weight"])
    others = torch.cat([head[:token], head[token + 1 :]])
    assert torch.allclose(head[token], others.mean(0), atol=1e-6)
    own = vlm.model.get_output_embeddings().weight
    assert torch.equal(others, torch.cat([own[:token], own[token + 1 :]]))
    assert not torch.allclose(own[token], head[token], atol=1e-3)


def test_llama_cpp_says_no_placeholder_of_smooth_pictures(tmp_path: Path) -> None:
    vlm = greedy_to_say_image(tied=False)
    convert(vlm.model, vlm.processor, "gguf", tmp_path)
    pictures = [smooth(seed) for seed in range(6)]
    found = answers(tmp_path, pictures, "What is it?", 8)  # type: ignore[arg-type]
    lengths = [sure(vlm, picture) for picture in pictures]
    assert sum(lengths) >= 8
    for picture, text, length in zip(pictures, found, lengths, strict=True):
        assert "<image>" not in text
        if length:
            expected = vlm.chat(picture, "What is it?", max_new_tokens=length)
            assert text.startswith(expected.rstrip("\ufffd"))


def idefics3(folder: Path, longest: int = 96, words: Any = None) -> chiasm.VLM:
    """Tiles of 32 pixels, four visual tokens each, at most 3 × 3."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    if words is None:
        words = tiny.tokenizer(None)
        words.add_tokens(["\n\n"])
    places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    words.add_tokens([*test_idefics3.MARKS, "<global-img>", *places], special_tokens=True)
    text = {"vocab_size": len(words), "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    config = LlamaConfig(**sizes, **text, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048)
    changes = {"text_config": config.to_dict(), "vision_config": sizes | {"image_size": 32, "patch_size": 8}}
    test_idefics3.reference(folder, **changes, image_token_id=words.convert_tokens_to_ids("<image>"))
    images = Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": 32})
    template = test_idefics3.TEMPLATE
    Idefics3Processor(images, words, image_seq_len=4, chat_template=template).save_pretrained(folder)
    vlm = chiasm.load(folder)
    torch.manual_seed(7)
    for parameter in vlm.model.language.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3)
    vlm.model.connector.output.weight.data.mul_(4)
    return vlm


def test_llama_cpp_gives_the_same_text_of_tiles(tmp_path: Path) -> None:
    vlm = idefics3(tmp_path / "theirs")
    done = convert(vlm.model, vlm.processor, "gguf", tmp_path / "out")
    assert any("only square pictures of 96 pixels" in note for note in done.notes)
    pictures = [None, *(tiny.picture(seed).resize((96, 96)) for seed in (3, 5, 8))]
    found = answers(tmp_path / "out", pictures, "What is it?", 8)
    lengths = [sure(vlm, picture) for picture in pictures]
    assert sum(lengths[1:]) >= 6
    for picture, text, length in zip(pictures, found, lengths, strict=True):
        if length:
            assert text.startswith(vlm.chat(picture, "What is it?", max_new_tokens=length).rstrip("\ufffd"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"longest": 32}, "this model reads those of up to 32 pixels as one"),
        ({"words": tiny.tokenizer(None)}, r"around tiles, a token each; .* more than one for '\\n\\n'"),
    ],
)
def test_tiles_that_llama_cpp_writes_otherwise_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    vlm = idefics3(tmp_path / "theirs", **options)
    with pytest.raises(ValueError, match=message):
        convert(vlm.model, vlm.processor, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("quantize", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("f16", "F16")])
def test_matrices_are_quantised_on_request(quantize: str, kind: str, tmp_path: Path) -> None:
    vlm = model()
    convert(vlm.model, vlm.processor, "gguf", tmp_path, quantize=quantize)
    tensors = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.0.attn_q.weight"] == kind and tensors["blk.0.attn_norm.weight"] == "F32"
    assert len(answers(tmp_path, [None], "Hello", 2)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"connector": tiny.connector("c_abstractor")},
            "no projector for connector 'c_abstractor'; .* or convert --to onnx$",
        ),
        ({"connector": {"name": "mlp", "activation": "silu"}}, "activation='silu'"),
        ({"language": tiny.language("gemma3")}, "a language model of type 'gemma3_text'"),
        ({"vision": tiny.vision("dinov2")}, "llama.cpp's projector types read CLIP and SigLIP"),
        ({"vision": tiny.vision("clip")}, "misplaces the class token .* with --inexact"),
        ({"language": small("llama", hidden_act="gelu")}, "hidden_act 'gelu', llama.cpp computes its kind with 'silu'"),
        ({"language": small("qwen3", attention_bias=True)}, "attention_bias, for which llama.cpp's 'qwen3'"),
        (
            {"language": small("qwen3", rope_parameters=LLAMA3)},
            "rope_type 'llama3', this conversion writes 'default' for",
        ),
        ({"language": small("mistral", sliding_window=7)}, "'mistral' models no sliding window, this one has one of 7"),
        ({"language": small("qwen2", **NEAR)}, "'qwen2' models no sliding window, this one has one of 7"),
        (
            {"connector": {"name": "pixel_shuffle", "projection": "linear"}},
            "in tiles and as a whole, .* a picture as one",
        ),
        ({"connector": "pixel_shuffle"}, "no projector for connector name='pixel_shuffle', factor=2, projection='mlp'"),
        ({"features": {"layers": [1, 2]}}, "llama.cpp reads the patches of one hidden state"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts = {"vision": tiny.vision("siglip"), "language": tiny.language(), "connector": "mlp"} | options
    vlm = chiasm.connect(**parts, tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match=message):
        convert(vlm.model, vlm.processor, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sliding_window_is_written_as_the_context_on_request(tmp_path: Path) -> None:
    options = {"sliding_window": 7, "max_position_embeddings": 99}
    vlm = chiasm.connect(tiny.vision("siglip"), small("mistral", **options), "mlp", tokenizer=tiny.tokenizer())
    notes = convert(vlm.model, vlm.processor, "gguf", tmp_path, inexact=True).notes
    assert any("keep texts and answers below 7 tokens" in note for note in notes)
    field = GGUFReader(tmp_path / "model.gguf").get_field("llama.context_length")
    assert field is not None and field.contents() == 7


@pytest.mark.parametrize(("mean", "told"), [((0.5, 0.5, 0.5), True), ((0.48145466, 0.4578275, 0.40821073), False)])
def test_how_pictures_are_padded_is_said(mean: tuple[float, ...], told: bool, tmp_path: Path) -> None:
    options = {"tokenizer": tiny.tokenizer(), "resize_mode": "pad"}
    vlm = chiasm.connect(tiny.vision("siglip"), tiny.language(), "mlp", **options)
    vlm.processor.image_processor.image_mean = list(mean)
    notes = convert(vlm.model, vlm.processor, "gguf", tmp_path).notes
    colour = " with (122, 116, 104), not (127, 127, 127)" if told else ""
    assert any(f"llama.cpp pads pictures{colour} once they are scaled" in note for note in notes)


def test_clip_is_written_for_a_repaired_llama_cpp_only_on_request(tmp_path: Path) -> None:
    vlm = chiasm.connect(tiny.vision("clip"), tiny.language(), "mlp", tokenizer=tiny.tokenizer())
    notes = convert(vlm.model, vlm.processor, "gguf", tmp_path, inexact=True).notes
    assert any("class token" in note and "wrong" in note for note in notes)
    names = {tensor.name for tensor in GGUFReader(tmp_path / "mmproj.gguf").tensors}
    assert "v.class_embd" in names


@pytest.mark.parametrize(
    ("change", "mean", "std"),
    [
        ({"rescale_factor": 1 / 127.5}, 0.25, 0.125),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_normalize": False, "do_rescale": False}, 0.0, 1 / 255),
    ],
)
def test_another_scale_of_pixels_is_in_mean_and_deviation(
    change: dict[str, Any], mean: float, std: float, tmp_path: Path
) -> None:
    vlm = model()
    images = vlm.processor.image_processor
    images.image_mean, images.image_std = [0.5] * 3, [0.25] * 3
    for name, value in change.items():
        setattr(images, name, value)
    convert(vlm.model, vlm.processor, "gguf", tmp_path)
    fields = GGUFReader(tmp_path / "mmproj.gguf").fields
    found = [fields[f"clip.vision.image_{name}"].contents() for name in ("mean", "std")]
    assert found == [pytest.approx([mean] * 3), pytest.approx([std] * 3)]


def test_every_end_of_an_answer_is_written_or_said(tmp_path: Path) -> None:
    vlm = model()
    vlm.model.generation_config.eos_token_id = [257, 65, 66, 67]
    vlm.model.generation_config.repetition_penalty = 1.3
    vlm.processor.image_processor.resample = 2
    notes = convert(vlm.model, vlm.processor, "gguf", tmp_path).notes
    fields = GGUFReader(tmp_path / "model.gguf").fields
    found = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")]
    assert found == [257, 65, 66]
    for said in ("stop at [67] too", "repetition_penalty 1.3 is not in GGUF files", "by resample 2"):
        assert any(said in note for note in notes), notes
