"""Early fusion of pictures in tiles, by an MLP or a linear projector → LLaVA-NeXT of transformers (2024)."""

from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.llava import Reading, as_projector, find_reading
from chiasm.interop.export.parts import Exported, filled, headed, require, require_plain, text_settings
from chiasm.interop.export.prompts import portable_template, portable_tokenizer
from chiasm.interop.llava_next import table
from chiasm.vision.probe import pair

NEWLINE = "connector.image_newline"


def export_llava_next(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' LLaVA-NeXT.

    Raises:
        ValueError: LLaVA-NeXT cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "LLaVA-NeXT", tiles=True)
    activation, projector = as_projector(model)
    reading = find_reading(model.vision)
    height, width = model.vision.image_size
    require(
        getattr(reading.vision_config, "image_size", None) == height == width,
        f"LLaVA-NeXT's tiles are squares of one image_size, this encoder takes pictures of {height}×{width}",
        "connect a CLIP or SigLIP encoder with its own image_size",
    )
    config = LlavaNextConfig(
        vision_config=reading.vision_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=model.connector.num_tokens,
        image_grid_pinpoints=[[rows * height, columns * width] for rows, columns in model.config.tiles],
        projector_hidden_act=activation,
        multimodal_projector_bias="connector.layers.0.bias" in projector,
        vision_feature_layer=reading.layers,
        vision_feature_select_strategy=reading.strategy,
        **text_settings(model),
    )
    ours = {name: tensor for name, tensor in headed(model).items() if not name.startswith("connector.")}
    ours |= projector | {NEWLINE: model.state_dict()[NEWLINE]}
    theirs = filled(LlavaNextForConditionalGeneration, config, model, table(config), ours)
    return Exported(theirs, None if processor is None else _processor(processor, reading))


def _processor(processor: ChiasmProcessor, reading: Reading) -> LlavaNextProcessor:
    """The processor, which counts a class token where the model leaves one out."""
    return LlavaNextProcessor(
        processor.image_processor,
        portable_tokenizer(processor),
        patch_size=pair(reading.vision_config.patch_size, "patch_size")[0],
        vision_feature_select_strategy=reading.strategy,
        chat_template=portable_template(processor),
        image_token=processor.image_token,
        num_additional_image_tokens=int(reading.strategy == "default"),
    )
