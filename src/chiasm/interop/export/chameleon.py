"""The unified transformer with Chameleon's image tokenizer → Chameleon checkpoints (arXiv 2405.09818)."""

from dataclasses import asdict
from typing import Any

from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonProcessor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.unified_settings import UnifiedSettings
from chiasm.interop.chameleon import BEGIN, CODE, END, LETTERS, SHARED, TABLE, chiasm_config
from chiasm.interop.export.asking import PROMPT_NOTE, by_prompt
from chiasm.interop.export.parts import Exported, filled, require, rows
from chiasm.interop.export.pictures import published_images
from chiasm.interop.export.prompts import portable_tokenizer, without_ending

LAYOUT = ("positions", "rope_sections", "qk_norm", "norm_order", "query_bias", "output_bias", "head_dim")
START = "start from a Chameleon checkpoint: chiasm.load(...)"


def export_chameleon(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' Chameleon.

    Raises:
        ValueError: Chameleon cannot hold it; the message says why and what would fit.
    """
    tower, decoder = model.config.vision_config, model.config.text_config
    require(
        tower.model_type == "chameleon_vqgan",
        f"Chameleon has an image tokenizer of its own, this model one of type {tower.model_type!r}",
        START,
    )
    require(
        decoder.model_type == "chiasm_decoder",
        f"Chameleon has a decoder of its own, this model one of type {decoder.model_type!r}",
        START,
    )
    config = ChameleonConfig(
        **{name: getattr(decoder, name) for name in SHARED} | {"vocab_size": rows(model)},
        attention_bias=decoder.query_bias,
        swin_norm=decoder.norm_order == "post",
        vq_config=tower.to_dict(),
        vocabulary_map=_words(model),
        dtype=model.language.dtype,
    )
    back = chiasm_config(config)
    ours, told = _told(model.config), _told(back)
    for name, wanted in told.items():
        have = ours[name]
        require(have == wanted, f"this model has {name} {_short(have)}, where Chameleon has {_short(wanted)}", START)
    theirs = filled(ChameleonForConditionalGeneration, config, model, TABLE)
    if processor is None:
        return Exported(theirs, None)
    return Exported(theirs, _processor(model, processor), notes=(PROMPT_NOTE,), ask=by_prompt)


def _told(config: ChiasmConfig) -> dict[str, Any]:
    """What makes the decoder Chameleon's."""
    tokens = asdict(UnifiedSettings.of(config.unified)) | {"z_loss": None}
    return {name: getattr(config.text_config, name) for name in LAYOUT} | tokens


def _words(model: FusionModel) -> dict[str, int]:
    """The words of the vocabulary that stand for pictures: the placeholder, and every code."""
    codes = (model.config.unified or {}).get("code_ids")
    require(isinstance(codes, list), f"this model has code_ids {_short(codes)}, Chameleon one for each code", START)
    spelled = ("".join(LETTERS[int(digit)] for digit in str(code)) for code in range(len(codes or ())))
    return {"<image>": model.config.image_token_id} | {
        f"{CODE}{letters}Z": token for letters, token in zip(spelled, codes or (), strict=True)
    }


def _short(value: Any) -> str:
    return f"of {len(value)} entries" if isinstance(value, list | dict) else repr(value)


def _processor(model: FusionModel, processor: ChiasmProcessor) -> ChameleonProcessor:
    words = portable_tokenizer(processor)
    require(
        processor.image_boundary == [BEGIN, END] and bool(words.sep_token),
        f"Chameleon frames pictures with {BEGIN} and {END} and ends turns with a sep_token, this model's processor "
        f"frames them with {processor.image_boundary!r} and has sep_token {words.sep_token!r}",
        START,
    )
    published = published_images(processor.image_processor)
    kept = {name: value for name, value in published.to_dict().items() if name != "image_processor_type"}
    words.chat_template = without_ending(processor, words.sep_token)
    pictures = ChameleonImageProcessorPil(**kept)
    return ChameleonProcessor(pictures, words, model.num_image_tokens, image_token=processor.image_token)
