"""Early fusion with a Q-Former → BLIP-2 (arXiv 2301.12597) and InstructBLIP (arXiv 2305.06500) of transformers."""

from typing import Any

from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from chiasm.data.instruction import InstructionProcessor
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.fusion.config import ChiasmConfig
from chiasm.interop.blip2 import all_tokens, blip2_table, qformer_settings
from chiasm.interop.export.asking import ONE_PICTURE_NOTE, PROMPT_NOTE, by_prompt
from chiasm.interop.export.parts import (
    Exported,
    filled,
    require,
    require_plain,
    require_same,
    rows,
    weights,
)
from chiasm.interop.export.pictures import published_images
from chiasm.interop.export.prompts import words_behind_pictures

TOWERS = ("blip_2_vision_model", "instructblip_vision_model")
TEXT_BRANCH = ("words", "positions", "text_feed_forward")
"""Components of the names of what a Q-Former reads captions with, which generation does not use."""


def export_blip2(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' BLIP-2, or InstructBLIP where the Q-Former reads the instruction.

    Raises:
        ValueError: neither can hold it; the message says why and what would fit.
    """
    kind = "InstructBLIP" if model.connector.reads_instruction else "BLIP-2"
    require_plain(model, kind, own_head=False)
    tower = model.config.vision_config
    require(
        tower.model_type in TOWERS,
        f"{kind} has an encoder of its own, this model one of type {tower.model_type!r}",
        f"connect one of type {' or '.join(TOWERS)}, or take connector mlp, which becomes LLaVA",
    )
    config = _config(model)
    ours = weights(model)
    if kind == "BLIP-2":
        ours = {name: tensor for name, tensor in ours.items() if not set(name.split(".")) & set(TEXT_BRANCH)}
    back = ChiasmConfig(
        connector=qformer_settings(config) | {"vocabulary": model.config.connector["vocabulary"]},
        features=all_tokens(config.vision_config).to_dict(),
        vision_config=config.vision_config,
        text_config=config.text_config,
    )
    require_same(model, back, kind)
    family: Any = InstructBlipForConditionalGeneration if kind == "InstructBLIP" else Blip2ForConditionalGeneration
    theirs = filled(family, config, model, blip2_table(config), ours)
    if processor is None:
        return Exported(theirs, None)
    return Exported(theirs, _processor(model, processor, kind), notes=(PROMPT_NOTE, ONE_PICTURE_NOTE), ask=by_prompt)


def _config(model: FusionModel) -> Any:
    settings, text = model.config.connector, model.config.text_config.to_dict()
    qformer = {
        "hidden_size": settings["width"],
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["heads"],
        "cross_attention_frequency": settings["cross_attention_every"],
        "intermediate_size": settings["feed_forward"] or 4 * settings["width"],
        "max_position_embeddings": settings["max_positions"],
        "layer_norm_eps": settings["eps"],
        "hidden_dropout_prob": settings["dropout"],
        "attention_probs_dropout_prob": settings["dropout"],
        "encoder_hidden_size": model.vision.width,
    }
    if settings["vocabulary"]:
        qformer["vocab_size"] = settings["vocabulary"]
    family: Any = InstructBlipConfig if model.connector.reads_instruction else Blip2Config
    tower = {name: value for name, value in model.config.vision_config.to_dict().items() if name != "model_type"}
    return family(
        vision_config=tower,
        qformer_config=qformer,
        text_config=text | {"vocab_size": rows(model)},
        num_query_tokens=settings["num_queries"],
        image_token_index=model.config.image_token_id,
        dtype=model.language.dtype,
    )


def _processor(model: FusionModel, processor: ChiasmProcessor, kind: str) -> Any:
    images = published_images(processor.image_processor)
    words = words_behind_pictures(processor, kind, isinstance(processor, InstructionProcessor))
    tokens = model.config.connector["num_queries"]
    if isinstance(processor, InstructionProcessor):
        return InstructBlipProcessor(images, words, processor.instruction_tokenizer, num_query_tokens=tokens)
    return Blip2Processor(images, words, num_query_tokens=tokens)
