"""InternVL checkpoints of transformers → early fusion with pixel shuffle, with equal logits (arXiv 2404.16821)."""

import torch
from transformers import InternVLConfig

from chiasm.data.chat import IMAGE_TOKEN
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.parts import (
    describe_features,
    load_headed,
    load_processor,
    table_of,
    text_settings,
)
from chiasm.interop.weights import Table
from chiasm.vision.features import VisionFeatures

PARTS = {
    "vision_tower": "vision.model",
    "multi_modal_projector.layer_norm": "connector.layers.0",
    "multi_modal_projector.linear_1": "connector.layers.1",
    "multi_modal_projector.linear_2": "connector.layers.3",
}
"""Names up to v4.51; later ones have `model.` in front, and the language model without its own prefix and head."""

FRAME = {"start_image_token": "<img>", "end_image_token": "</img>"}
"""A tokenizer's attributes for what opens and closes a picture, and the tokens that InternVL has for it."""


def load_internvl(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model and processor of an InternVL folder or hub id; no processor where its files are missing.

    For the model, a tile of a picture is a picture of its own; the processor cuts the tiles.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    model = load_headed(source, chiasm_config, table, dtype)
    return model, _processor(source, model)


def _processor(source: str, model: EarlyFusionModel) -> ChiasmProcessor | None:
    """InternVL's tokenizer names what frames a picture; the chat template writes the placeholder itself."""
    processor = load_processor(source, model, own_images=True, add_special_tokens=True, image_tiles=None)
    if processor is None:
        return None
    processor.image_processor.crop_to_patches = False  # a call that wants tiles says so
    words = processor.tokenizer
    processor.image_boundary = [getattr(words, name, token) for name, token in FRAME.items()]
    processor.image_token_id = model.config.image_token_id
    processor.image_token = words.convert_ids_to_tokens(processor.image_token_id)
    if processor.image_token is None or not set(processor.image_boundary) <= set(words.get_vocab()):
        raise ValueError(
            f"the tokenizer in {source} lacks {' or '.join(processor.image_boundary)}, or a token of the number "
            f"{processor.image_token_id}, which stand for a picture; take the tokenizer that belongs to this model"
        )
    if words.chat_template:
        words.chat_template = words.chat_template.replace(processor.image_token, IMAGE_TOKEN)
    return processor


def chiasm_config(config: InternVLConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words."""
    if config.projector_hidden_act != "gelu":
        raise ValueError(
            f"this InternVL has projector_hidden_act={config.projector_hidden_act!r}, expected 'gelu', "
            "which is what pixel_shuffle has"
        )
    return ChiasmConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=text_settings(config),
        connector={"name": "pixel_shuffle", "factor": int(1 / config.downsample_ratio), "projection": "mlp"},
        features=features(config).to_dict(),
        image_token_id=config.image_token_id,
        dtype=config.dtype,
    )


def features(config: InternVLConfig) -> VisionFeatures:
    """What InternVL reads of its tower: one layer, without the class token."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"this InternVL reads vision_feature_layer={layer}, vision_feature_select_strategy="
            f"{config.vision_feature_select_strategy!r}; expected one layer and 'default', for blocks need a grid"
        )
    return describe_features(config.vision_config, {"layers": ["last" if layer == -1 else layer]})


def table(config: InternVLConfig) -> Table:
    """InternVL's names → ours, for files of any version."""
    return table_of(PARTS, config.text_config)
