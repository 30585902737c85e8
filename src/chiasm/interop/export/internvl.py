"""Early fusion with InternVL's encoder and pixel shuffle → InternVL of transformers (arXiv 2404.16821)."""

from typing import Any

from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, PreTrainedTokenizerBase
from transformers.utils import PushToHubMixin, is_torchvision_available

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import (
    Exported,
    filled,
    headed,
    require,
    require_plain,
    require_same,
    require_tower,
    rows,
    text_settings,
)
from chiasm.interop.export.prompts import name_tokens, portable_template, portable_tokenizer
from chiasm.interop.internvl import FRAME, chiasm_config, table
from chiasm.language.generation_settings import change

VIDEO = "<video>"
SHARED = ("size", "image_mean", "image_std", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize")
"""Settings that the processors for pictures and for videos both have."""

NOTE = (
    "AutoProcessor and pipeline need torchvision for this folder, for InternVL reads videos too; it is not installed "
    "here, so that the processor was compared before it was saved"
)


class VideoSettings(PushToHubMixin):
    """What a folder says of videos; the class that would read them needs torchvision."""

    _auto_class = None

    def __init__(self, images: Any) -> None:
        self.images = images

    def to_dict(self) -> dict[str, Any]:
        told = self.images.to_dict()
        return {name: told[name] for name in SHARED if name in told} | {
            "video_processor_type": "InternVLVideoProcessor"
        }


class ProcessorOfPictures(InternVLProcessor):
    """InternVL's processor, which can be made and saved without torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if not isinstance(argument, VideoSettings):
            super().check_argument_for_proper_class(argument_name, argument)


ProcessorOfPictures.__name__ = InternVLProcessor.__name__


def export_internvl(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' InternVL.

    Raises:
        ValueError: InternVL cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "InternVL")
    require_tower(model, "internvl_vision", "InternVL")
    settings = model.config.connector
    layer = model.vision.features.layers[0].layer
    words = None if processor is None else _words(processor)
    count, text = max(rows(model), 0 if words is None else len(words)), text_settings(model)
    text["text_config"]["vocab_size"] = count
    config = InternVLConfig(
        vision_config=model.config.vision_config.to_dict(),
        image_token_id=model.config.image_token_id,
        image_seq_length=model.num_image_tokens,
        downsample_ratio=1 / settings["factor"],
        vision_feature_layer=-1 if layer == "last" else layer,
        **text,
    )
    require_same(model, chiasm_config(config), "InternVL")
    theirs = filled(InternVLForConditionalGeneration, config, model, table(config), headed(model, count))
    if processor is None or words is None:
        return Exported(theirs, None)
    never = {*(theirs.generation_config.suppress_tokens or []), *range(rows(model), count)}
    change(theirs.generation_config, suppress_tokens=sorted(never))
    loads = is_torchvision_available()
    return Exported(theirs, _processor(model, processor, words), loads, () if loads else (NOTE,))


def _words(processor: ChiasmProcessor) -> PreTrainedTokenizerBase:
    """The tokenizer with the names of InternVL's tokens; its processor wants one for videos too. What was added to it,
    that and Chiasm's placeholder, gets rows in the embedding table, so that a text may hold it."""
    frame = processor.image_boundary
    require(
        isinstance(frame, list) and len(frame) == len(FRAME) and processor.image_tiles is None,
        "this model's processor neither frames pictures nor cuts them into tiles, as InternVL's does",
        "start from an InternVL checkpoint: chiasm.load(...)",
    )
    words = portable_tokenizer(processor)
    words.add_tokens([VIDEO], special_tokens=True)
    tokens = {"context_image_token": processor.image_token, "video_token": VIDEO}
    name_tokens(words, tokens | dict(zip(FRAME, frame, strict=True)))  # type: ignore[arg-type]
    return words


def _processor(model: FusionModel, processor: ChiasmProcessor, words: PreTrainedTokenizerBase) -> InternVLProcessor:
    return ProcessorOfPictures(
        processor.image_processor,
        words,
        VideoSettings(processor.image_processor),
        image_seq_length=model.num_image_tokens,
        chat_template=portable_template(processor),
    )
