"""`--to gguf`: a language model and an `mmproj` file that llama.cpp, ollama and their like run together."""

from pathlib import Path
from typing import Any

import gguf
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter
from PIL import Image

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.gguf_language import (
    ARCHITECTURES,
    QUANTIZATIONS,
    file_type,
    own_quantization,
    require_architecture,
    window,
    write_language,
)
from chiasm.interop.export.gguf_tiles import NOTE, TILED, longest_side, require_tokens
from chiasm.interop.export.gguf_tokenizer import more_ends, write_tokenizer
from chiasm.interop.export.gguf_vision import CLASS_TOKEN, ELSEWHERE, depth, projector, write_vision
from chiasm.interop.export.parts import ends, require, require_plain, rows, unchosen
from chiasm.interop.export.prompts import marked_template
from chiasm.vision.image_processor import ChiasmImageProcessor

LANGUAGE, VISION = "model.gguf", "mmproj.gguf"


def export_gguf(
    model: FusionModel, processor: ChiasmProcessor | None, folder: Path, quantize: str | None, inexact: bool = False
) -> list[str]:
    """Writes both files, and returns what is good to know about them.

    Args:
        inexact: whether they are written too where llama.cpp computes something else.

    Raises:
        ValueError: llama.cpp cannot run the model; the message says why and what would.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ValueError(f"--quantize {quantize!r} is unknown; choose one of {', '.join(QUANTIZATIONS)}")
    require(
        model.config.fusion == "early",
        f"llama.cpp has no {model.config.fusion} fusion",
        "use Chiasm's own server",
    )
    require_plain(model, "GGUF")
    require_architecture(model.config.text_config)
    text, near = model.config.text_config, window(model.config.text_config)
    require(
        inexact or near is None,
        f"llama.cpp gives {text.model_type!r} models no sliding window, this one has one of {near} tokens, so "
        "that its answers to longer texts would be others",
        f"write the files for texts of up to {near} tokens with --inexact, or convert --to onnx",
    )
    depth(model)
    kind, _ = projector(model)
    require(
        kind != TILED or model.config.vision_config.model_type not in CLASS_TOKEN,
        f"llama.cpp's {TILED!r} has no class token, this {model.config.vision_config.model_type!r} encoder has one",
        "connect a siglip_vision_model",
    )
    require(
        inexact or model.config.vision_config.model_type not in CLASS_TOKEN,
        f"llama.cpp misplaces the class token of {model.config.vision_config.model_type!r} encoders (its issue 25814), "
        "so that its answers about pictures would be wrong",
        f"connect a siglip_vision_model, write the files for a repaired llama.cpp with --inexact, or {ELSEWHERE}",
    )
    if processor is None:
        raise ValueError("a GGUF file holds its tokenizer, and this model came without; put its files into the folder")
    images = processor.image_processor
    longest = longest_side(model, processor) if kind == TILED else None
    if kind == TILED:
        require_tokens(processor)
    template = marked_template(processor)
    quantization = quantize or own_quantization(model.language.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _write_language(model, processor, folder / LANGUAGE, quantization, template)
    _write_vision(model, images, folder / VISION, own_quantization(model.language.dtype), longest)
    return _notes(model, processor) + ([] if longest is None else [NOTE.format(side=longest)])


def _write_language(
    model: FusionModel, processor: ChiasmProcessor, path: Path, quantization: str, template: str
) -> None:
    config = model.config.text_config
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(file_type(quantization))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    words, count = processor.tokenizer, rows(model)
    adds = processor.add_special_tokens and words("a")["input_ids"][:1] == [words.bos_token_id]
    write_tokenizer(writer, words, count, adds, template, ends(model))
    state = unchosen(model)
    parts = {name.removeprefix("language."): tensor for name, tensor in state.items() if name.startswith("language.")}
    write_language(writer, config, parts, count, quantization)
    _close(writer)


def _write_vision(model: FusionModel, images: Any, path: Path, quantization: str, longest: int | None) -> None:
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ])
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(file_type(quantization))
    write_vision(writer, model, images, quantization, longest)
    _close(writer)


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA_CPPS_MARGIN = (122, 116, 104)
"""What llama.cpp pads with: the mean colour of CLIP's pictures."""


def _notes(model: FusionModel, processor: ChiasmProcessor) -> list[str]:
    notes = []
    if (penalty := model.generation_config.repetition_penalty) not in (None, 1.0):
        notes.append(
            f"the model's own repetition_penalty {penalty} is not in GGUF files: pass it to what runs them, or answers "
            "are others"
        )
    if len(unknown := more_ends(processor.tokenizer, ends(model))[2:]):
        notes.append(f"llama.cpp knows three tokens that end an answer, this model has more: stop at {unknown} too")
    if model.config.vision_config.model_type in CLASS_TOKEN:
        notes.append(
            "llama.cpp misplaces the class token of this encoder (its issue 25814, still so in a build of 2026-10): "
            "answers about pictures are wrong until it is repaired"
        )
    if (near := window(model.config.text_config)) is not None:
        notes.append(f"llama.cpp has no sliding window for this model: keep texts and answers below {near} tokens")
    images = processor.image_processor
    if isinstance(images, ChiasmImageProcessor) and images.resample != Image.Resampling.BICUBIC:
        notes.append(
            f"llama.cpp scales pictures by a filter of its own, this model's processor by resample {images.resample}: "
            f"pictures that are not {images.size['height']}×{images.size['width']} look a little different to it"
        )
    if isinstance(images, ChiasmImageProcessor) and images.resize_mode != "pad":
        notes.append(
            f"llama.cpp pads pictures to a square, this model's processor has resize_mode {images.resize_mode!r}: "
            "pictures that are not square look different to it"
        )
    elif isinstance(images, ChiasmImageProcessor):
        colour = "" if images.margin == LLAMA_CPPS_MARGIN else f" with {LLAMA_CPPS_MARGIN}, not {images.margin}"
        notes.append(
            f"llama.cpp pads pictures{colour} once they are scaled, this model's processor before: pictures that are "
            "not square look a little different to it"
        )
    return notes
