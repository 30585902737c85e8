"""Early fusion with InternVL's encoder and pixel shuffle → InternVL of transformers (arXiv 2404.16821)."""

from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, PreTrainedTokenizerBase
from transformers.utils import is_torchvision_available

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
from chiasm.interop.export.videos import NOTE, VideoSettings, of_pictures
from chiasm.interop.internvl import FRAME, chiasm_config, table
from chiasm.language.generation_settings import change

VIDEO = "<video>"


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
    return of_pictures(InternVLProcessor)(
        processor.image_processor,
        words,
        VideoSettings(processor.image_processor, "InternVLVideoProcessor"),
        image_seq_length=model.num_image_tokens,
        chat_template=portable_template(processor),
    )
