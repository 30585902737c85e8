"""Early fusion with SigLIP and pixel shuffle, one matrix → Idefics3 checkpoints of transformers (arXiv 2408.12637)."""

from typing import Any

from transformers import DeepseekVLProcessor, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import (
    Exported,
    filled,
    headed,
    require,
    require_plain,
    require_same,
    text_settings,
)
from chiasm.interop.export.prompts import name_tokens, portable_template, portable_tokenizer
from chiasm.interop.idefics3 import BOUNDARY, WHOLE, chiasm_config, positions, table
from chiasm.vision.image_processor import KEPT, ChiasmImageProcessor

TOWERS = ("idefics3_vision", "smolvlm_vision", "siglip_vision_model")
"""Encoders that compute what Idefics3's computes, and name their weights alike."""

POOLING_HEAD = "vision.model.head."

NOTE = (
    "Idefics3's processor writes <fake_token_around_image> and <global-img> around a picture, this model does not; so "
    "the folder has the processor of DeepSeek-VL, which writes the placeholders alone. Tools that look for Idefics3's "
    "own do not run it"
)


def export_idefics3(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' Idefics3.

    Raises:
        ValueError: Idefics3 cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "Idefics3")
    tower: Any = model.config.vision_config
    require(
        tower.model_type in TOWERS,
        f"Idefics3's encoder is SigLIP's, this one is of type {tower.model_type!r}",
        f"connect one of {', '.join(TOWERS)}; or take connector mlp, which becomes LLaVA",
    )
    sizes = {name: getattr(tower, name) for name in Idefics3VisionConfig().to_dict() if hasattr(tower, name)}
    config = Idefics3Config(
        vision_config={**sizes, "model_type": Idefics3VisionConfig.model_type},
        image_token_id=model.config.image_token_id,
        scale_factor=model.config.connector["factor"],
        **text_settings(model),
    )
    side = model.vision.grid[0]
    require(
        side == model.vision.grid[1],
        f"Idefics3 reads square pictures, this encoder has a grid of {side}×{model.vision.grid[1]}",
        "connect with a square image_size",
    )
    require_same(model, chiasm_config(config), "Idefics3")
    require(
        tower.model_type != "siglip_vision_model" or positions(side) == list(range(side)),
        f"transformers' Idefics3 gives some of {side}×{side} patches their neighbours' positions, by a rounding",
        "connect with another image_size",
    )
    ours = {name: tensor for name, tensor in headed(model).items() if not name.startswith(POOLING_HEAD)}
    theirs = filled(Idefics3ForConditionalGeneration, config, model, table(config), ours)
    if processor is None:
        return Exported(theirs, None, rows=True)
    if processor.image_tag is None:
        return Exported(theirs, _plain_processor(model, processor), notes=(NOTE,), rows=True)
    return Exported(theirs, _processor(model, processor), rows=True)


def _processor(model: FusionModel, processor: ChiasmProcessor) -> Idefics3Processor:
    written = (processor.image_boundary, processor.image_tag)
    require(
        written == (BOUNDARY, WHOLE),
        f"this model writes {written[0]} and {written[1]} at a picture, Idefics3's processor {BOUNDARY} and {WHOLE}",
        "give the tokenizer those tokens",
    )
    return Idefics3Processor(
        _images(model, processor.image_processor),
        portable_tokenizer(processor),
        image_seq_len=model.num_image_tokens,
        chat_template=portable_template(processor),
    )


def _plain_processor(model: FusionModel, processor: ChiasmProcessor) -> DeepseekVLProcessor:
    """A processor that writes placeholders alone; of transformers', DeepSeek-VL's."""
    require(
        processor.image_boundary is None and processor.image_tiles == 1,
        "this model's processor frames pictures or cuts them otherwise than Idefics3's does",
        "set vlm.processor.image_boundary = None and image_tiles = 1 if it was trained so",
    )
    words = portable_tokenizer(processor)
    name_tokens(words, {"image_token": processor.image_token})
    images = _images(model, processor.image_processor)
    template = portable_template(processor)
    return DeepseekVLProcessor(images, words, chat_template=template, num_image_tokens=model.num_image_tokens)


def _images(model: FusionModel, images: Any) -> Any:
    """Pictures in rows, of one size; an image processor of transformers' own stays as it is."""
    if not isinstance(images, ChiasmImageProcessor):
        return images
    require(
        images.resize_mode == "squash",
        f"Idefics3's image processor gives a picture the encoder's size by squashing, this model's has resize_mode "
        f"{images.resize_mode!r}",
        "connect with resize_mode='squash'",
    )
    kept = {name: getattr(images, name) for name in KEPT}
    side = {"longest_edge": model.vision.image_size[0]}
    return Idefics3ImageProcessorPil(
        do_resize=False, do_image_splitting=False, do_convert_rgb=True, size=side, max_image_size=side, **kept
    )
