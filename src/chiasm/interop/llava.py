"""LLaVA checkpoints of transformers → early fusion with an MLP projector, with equal logits (arXiv 2310.03744)."""

import torch
from transformers import LlavaConfig

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.parts import (
    describe_features,
    image_token,
    load_headed,
    load_processor,
    table_of,
    text_settings,
    without_first,
)
from chiasm.interop.weights import Table
from chiasm.vision.features import VisionFeatures
from chiasm.vision.towers import model_class, without_pooler

PARTS = {
    "vision_tower": "vision.model",
    "vision_tower.vision_model": "vision.model",
    "multi_modal_projector.linear_1": "connector.layers.0",
    "multi_modal_projector.linear_2": "connector.layers.1",
}
"""Names up to v4.51; later ones have `model.` in front, and the language model without its own prefix and head."""


def load_llava(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model and processor of a LLaVA folder or hub id; no processor where its files are missing.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    model = load_headed(source, chiasm_config, table, dtype)
    return model, load_processor(source, model, add_special_tokens=True, image_token=image_token(source))


def chiasm_config(config: LlavaConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words."""
    return ChiasmConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=text_settings(config),
        connector={
            "name": "mlp",
            "depth": 2,
            "width": None,
            "bias": config.multimodal_projector_bias,
            "activation": config.projector_hidden_act,
        },
        features=features(config).to_dict(),
        image_token_id=config.image_token_id,
        dtype=config.dtype,
    )


def features(config: LlavaConfig) -> VisionFeatures:
    """What LLaVA reads of its tower: of `default` the first token is left out, whatever it is; `full` is everything."""
    layers = config.vision_feature_layer
    wanted = {"layers": [layers] if isinstance(layers, int) else list(layers)}
    if config.vision_feature_select_strategy == "full":
        return describe_features(config.vision_config, wanted | {"prefix": "keep"})
    return without_first(describe_features(config.vision_config, wanted))


def table(config: LlavaConfig) -> Table:
    """LLaVA's names → ours, for files of any version; a pooler is not read."""
    pooler = {"vision_tower.pooler": None} if without_pooler(model_class(config.vision_config)) else {}
    parts: Table = {**PARTS, **pooler}
    return table_of(parts, config.text_config)
