"""Early fusion with InternVL's encoder and pixel shuffle → InternVL of transformers (arXiv 2404.16821)."""

from typing import Any

from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import (
    Exported,
    generation,
    require,
    require_plain,
    require_same,
    text_config,
    tied,
    weights,
)
from chiasm.interop.export.prompts import portable_template, portable_tokenizer
from chiasm.interop.internvl import FRAME, chiasm_config, table
from chiasm.interop.weights import counterpart


class ProcessorOfPictures(InternVLProcessor):
    """InternVL's processor without the one for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return argument and super().check_argument_for_proper_class(argument_name, argument)


ProcessorOfPictures.__name__ = InternVLProcessor.__name__


def export_internvl(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' InternVL.

    Raises:
        ValueError: InternVL cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "InternVL")
    tower = model.config.vision_config
    require(
        tower.model_type == "internvl_vision",
        f"InternVL has an encoder of its own, this model one of type {tower.model_type!r}",
        "connect an internvl_vision encoder, or take connector mlp, which becomes LLaVA",
    )
    settings = model.config.connector
    layer = model.vision.features.layers[0].layer
    config = InternVLConfig(
        vision_config=tower.to_dict(),
        text_config=text_config(model),
        image_token_id=model.config.image_token_id,
        image_seq_length=model.num_image_tokens,
        downsample_ratio=1 / settings["factor"],
        vision_feature_layer=-1 if layer == "last" else layer,
        tie_word_embeddings=tied(model),
        dtype=model.language.dtype,
    )
    require_same(model, chiasm_config(config), "InternVL")
    theirs = counterpart(InternVLForConditionalGeneration, config, weights(model), table(config))
    theirs.generation_config = generation(model)
    return Exported(theirs, None if processor is None else _processor(model, processor))


def _processor(model: FusionModel, processor: ChiasmProcessor) -> InternVLProcessor:
    frame = processor.image_boundary
    require(
        isinstance(frame, list) and len(frame) == len(FRAME) and processor.image_tiles is None,
        "this model's processor neither frames pictures nor cuts them into tiles, as InternVL's does",
        "start from an InternVL checkpoint: chiasm.load(...)",
    )
    words = portable_tokenizer(processor)
    tokens = {"context_image_token": processor.image_token, "video_token": "<video>"}
    tokens |= dict(zip(FRAME, frame, strict=True))  # type: ignore[arg-type]
    for name, token in tokens.items():
        if not hasattr(words, name):
            words.add_special_tokens({"extra_special_tokens": {name: token}})
    return ProcessorOfPictures(
        processor.image_processor,
        words,
        image_seq_length=model.num_image_tokens,
        chat_template=portable_template(processor),
    )
