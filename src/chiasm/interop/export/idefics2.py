"""Early fusion with Idefics2's encoder and resampler → Idefics2 checkpoints of transformers (arXiv 2405.02246)."""

from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import (
    Exported,
    filled,
    require,
    require_plain,
    require_same,
    require_tower,
    text_settings,
)
from chiasm.interop.export.prompts import portable_template, portable_tokenizer
from chiasm.interop.idefics2 import BOUNDARY, chiasm_config, table


def export_idefics2(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' Idefics2.

    Raises:
        ValueError: Idefics2 cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "Idefics2")
    require_tower(model, "idefics2_vision", "Idefics2")
    settings = model.config.connector
    perceiver = {
        "hidden_size": model.connector.language_width,
        "resampler_n_latents": settings["num_latents"],
        "resampler_depth": settings["depth"],
        "resampler_n_heads": settings["heads"],
        "num_key_value_heads": settings["key_value_heads"],
        "resampler_head_dim": settings["head_dim"],
        "rms_norm_eps": settings["eps"],
    }
    config = Idefics2Config(
        vision_config=model.config.vision_config.to_dict(),
        perceiver_config=perceiver,
        image_token_id=model.config.image_token_id,
        **text_settings(model),
    )
    require_same(model, chiasm_config(config), "Idefics2")
    theirs = filled(Idefics2ForConditionalGeneration, config, model, table(config))
    return Exported(theirs, None if processor is None else _processor(model, processor))


def _processor(model: FusionModel, processor: ChiasmProcessor) -> Idefics2Processor:
    require(
        processor.image_boundary == BOUNDARY and hasattr(processor.image_processor, "do_image_splitting"),
        "this model's processor neither frames pictures nor keeps their sizes, as Idefics2's does",
        "start from an Idefics2 checkpoint: chiasm.load(...)",
    )
    return Idefics2Processor(
        processor.image_processor,
        portable_tokenizer(processor),
        image_seq_len=model.num_image_tokens,
        chat_template=portable_template(processor),
    )
