"""Early fusion with a prefix mask and a linear projector → PaliGemma checkpoints of transformers (arXiv 2407.07726)."""

from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import (
    Exported,
    filled,
    require,
    require_plain,
    require_same,
    rows,
    text_settings,
)
from chiasm.interop.export.pictures import published_images
from chiasm.interop.export.prompts import SPREAD, portable_tokenizer, writes
from chiasm.interop.paligemma import TEMPLATE, chiasm_config, table
from chiasm.interop.parts import HEAD, TAIL

PORTABLE = HEAD + SPREAD + TEMPLATE + TAIL + "{{ (prompt | replace(bos_token, '')).removesuffix('\n') }}"
"""PaliGemma's own processor writes the beginning of text and the last line break."""


def export_paligemma(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' PaliGemma.

    Raises:
        ValueError: PaliGemma cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "PaliGemma", attention="prefix")
    require(
        model.config.vision_config.model_type == "siglip_vision_model",
        f"PaliGemma has a SigLIP encoder, this model one of type {model.config.vision_config.model_type!r}",
        "connect a siglip_vision_model",
    )
    text = model.config.text_config
    require(
        hasattr(text, "use_bidirectional_attention"),
        f"PaliGemma has a Gemma, this language model is of type {text.model_type!r}",
        "connect a gemma, gemma2 or gemma3_text",
    )
    width = model.connector.language_width
    config = PaliGemmaConfig(
        vision_config=model.config.vision_config.to_dict(),
        image_token_index=model.config.image_token_id,
        vocab_size=rows(model),
        projection_dim=width,
        hidden_size=width,
        **text_settings(model),
    )
    require_same(model, chiasm_config(config), "PaliGemma")
    theirs = filled(PaliGemmaForConditionalGeneration, config, model, table(config))
    return Exported(theirs, None if processor is None else _processor(model, processor))


def _processor(model: FusionModel, processor: ChiasmProcessor) -> PaliGemmaProcessor:
    require(
        writes(processor, TEMPLATE),
        "this model's prompts are not PaliGemma's (pictures, beginning of text, prompt, line break)",
        "connect with chat_template=chiasm.interop.paligemma.TEMPLATE before training",
    )
    images, words = published_images(processor.image_processor), portable_tokenizer(processor)
    images.image_seq_length = model.num_image_tokens
    words.add_tokens([processor.image_token], special_tokens=True)
    words.image_token, words.image_token_id = processor.image_token, processor.image_token_id
    return PaliGemmaProcessor(images, words, chat_template=PORTABLE)
