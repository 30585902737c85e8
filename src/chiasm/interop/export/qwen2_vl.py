"""Packed early fusion with M-RoPE → Qwen2-VL checkpoints of transformers (arXiv 2409.12191)."""

from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from chiasm.data.pixels import tells_grids
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.fusion.unified_start import SHARED
from chiasm.interop.export.parts import Exported, filled, headed, require, require_plain, rows, tied
from chiasm.interop.export.prompts import portable_template, portable_tokenizer
from chiasm.interop.export.videos import NOTE, VideoSettings, of_pictures
from chiasm.interop.qwen2_vl import BEGIN, END, PATCH_TOKEN, TABLE, chiasm_config

LAYOUT = ("positions", "rope_sections", "qk_norm", "norm_order", "query_bias", "output_bias", "mlp_bias", "head_dim")
START = "start from a Qwen2-VL checkpoint: chiasm.load(...)"


def export_qwen2_vl(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' Qwen2-VL.

    Raises:
        ValueError: Qwen2-VL cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "Qwen2-VL")
    tower, decoder = model.config.vision_config, model.config.text_config
    for part, found, wanted in (
        ("an encoder", tower.model_type, "qwen2_vl_vision"),
        ("a decoder", decoder.model_type, "chiasm_decoder"),
    ):
        require(found == wanted, f"Qwen2-VL has {part} of its own, this model one of type {found!r}", START)
    words = None if processor is None else portable_tokenizer(processor)
    count = max(rows(model), 0 if words is None else len(words))
    config = _config(model, words, count)
    back: Any = chiasm_config(config).text_config
    for name in LAYOUT:
        have, want = getattr(decoder, name), getattr(back, name)
        require(have == want, f"this model's decoder has {name} {have!r}, where Qwen2-VL has {want!r}", START)
    theirs = filled(Qwen2VLForConditionalGeneration, config, model, TABLE, headed(model, count))
    if processor is None or words is None:
        return Exported(theirs, None)
    loads = is_torchvision_available()
    return Exported(theirs, _processor(processor, words), loads, () if loads else (NOTE,))


def _config(model: FusionModel, words: PreTrainedTokenizerBase | None, count: int) -> Qwen2VLConfig:
    decoder: Any = model.config.text_config
    rope = {**decoder.rope_parameters, "mrope_section": decoder.rope_sections}
    sizes = {name: getattr(decoder, name) for name in SHARED} | {"vocab_size": count, "rope_parameters": rope}
    frame = {} if words is None else dict(zip(FRAME, words.convert_tokens_to_ids([BEGIN, END]), strict=True))
    return Qwen2VLConfig(
        text_config=sizes,
        vision_config=model.config.vision_config.to_dict(),
        image_token_id=model.config.image_token_id,
        video_token_id=model.config.video_token_id,
        tie_word_embeddings=tied(model),
        dtype=model.language.dtype,
        **frame,
    )


FRAME = ("vision_start_token_id", "vision_end_token_id")


def _processor(processor: ChiasmProcessor, words: PreTrainedTokenizerBase) -> Qwen2VLProcessor:
    """Its own class writes the placeholders alone, and the chat template what frames a picture."""
    frame, images = processor.image_boundary, processor.image_processor
    require(
        frame == [BEGIN, END] and processor.image_token == PATCH_TOKEN and tells_grids(images),
        f"this model's processor frames pictures with {frame!r}, Qwen2-VL's with {BEGIN} and {END}",
        START,
    )
    template = portable_template(processor).replace(PATCH_TOKEN, f"{BEGIN}{PATCH_TOKEN}{END}")
    videos = VideoSettings(images, "Qwen2VLVideoProcessor")
    return of_pictures(Qwen2VLProcessor)(images, words, videos, chat_template=template)
