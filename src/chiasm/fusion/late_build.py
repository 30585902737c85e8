"""A late-fusion model around two loaded towers; its projections are new."""

from typing import Any

import torch
from transformers import PreTrainedModel

from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.late_config import LateFusionConfig, late_connector_settings
from chiasm.language.text_tower import text_width
from chiasm.vision.encoder import VisionEncoder
from chiasm.vision.pooling import check_pooling, pool_patches


def build_late(
    vision: VisionEncoder,
    language: PreTrainedModel,
    connector: str | dict[str, Any],
    vision_pooling: str,
    text_pooling: str,
    seed: int = 0,
) -> LateFusionModel:
    """The model, whose projections are drawn from `seed`."""
    check_pooling(vision, vision_pooling)
    config = LateFusionConfig(
        vision_config=vision.model.config.to_dict(),
        text_config=language.config.to_dict(),
        features=vision.features.to_dict(),
        vision_pooling=vision_pooling,
        text_pooling=text_pooling,
        image_width=image_width(vision, vision_pooling),
        text_width=text_width(language, text_pooling),
        connector=late_connector_settings(connector),
        dtype=language.dtype,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LateFusionModel(config, vision=vision, language=language)
    model.connector.to(device=language.device, dtype=language.dtype)
    return model.eval()


@torch.no_grad()
def image_width(vision: VisionEncoder, pooling: str) -> int:
    """D_v: width of a picture's vector."""
    first = next(vision.parameters())
    blank = torch.zeros(1, vision.num_patches, vision.width, device=first.device, dtype=first.dtype)
    return pool_patches(vision, pooling, blank).shape[-1]
