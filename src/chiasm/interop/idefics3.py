"""Idefics3 and SmolVLM checkpoints of transformers → early fusion with pixel shuffle and one matrix (arXiv 2408.12637).

Both compute the same and name their weights alike.
"""

from typing import Any

import torch
from transformers import Idefics3Config

from chiasm.data.chat import IMAGE_TOKEN
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.parts import (
    language_table,
    load_headed,
    load_processor,
    text_settings,
)
from chiasm.interop.weights import Table
from chiasm.vision.features import FeatureLayer, VisionFeatures
from chiasm.vision.probe import pair

BOUNDARY, WHOLE, END_OF_UTTERANCE = "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"

PARTS = {
    "model.vision_model": "vision.model",
    "model.connector.modality_projection.proj": "connector.layers.0",
}


def load_idefics3(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model and processor of an Idefics3 or SmolVLM folder or hub id; no processor where its files are missing.

    For the model, a tile of a picture is a picture of its own; the processor cuts the tiles.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    model = load_headed(source, chiasm_config, table, dtype)
    return model, _processor(source, model)


def _processor(source: str, model: EarlyFusionModel) -> ChiasmProcessor | None:
    processor = load_processor(source, model, own_images=True, add_special_tokens=True)
    if processor is None:
        return None
    words: Any = processor.tokenizer
    processor.image_boundary = getattr(words, "fake_image_token", BOUNDARY)
    processor.image_tag = getattr(words, "global_image_token", WHOLE)
    processor.image_tiles = None if processor.image_processor.do_image_splitting else 1
    words.add_tokens([processor.image_boundary, IMAGE_TOKEN, END_OF_UTTERANCE], special_tokens=True)
    return processor


def chiasm_config(config: Idefics3Config) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words.

    Raises:
        ValueError: the patches make no whole blocks.
    """
    read = features(config)
    if read.grid[0] % config.scale_factor:
        raise ValueError(
            f"this model has scale_factor={config.scale_factor}, which does not divide its {read.grid[0]} patches a "
            "side; transformers cannot run it either"
        )
    return ChiasmConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=text_settings(config),
        connector={"name": "pixel_shuffle", "factor": config.scale_factor, "projection": "linear"},
        features=read.to_dict(),
        image_token_id=config.image_token_id,
        dtype=config.dtype,
    )


def features(config: Idefics3Config) -> VisionFeatures:
    """The tower's normalised output. Its forward looks at the values of a mask, so it cannot be probed without data."""
    vision: Any = config.vision_config
    size, patch = pair(vision.image_size), pair(vision.patch_size)
    grid = (size[0] // patch[0], size[1] // patch[1])
    return VisionFeatures((FeatureLayer("last", grid),), grid, vision.hidden_size, size)


def table(config: Idefics3Config) -> Table:
    """Idefics3's names → ours."""
    return {**PARTS} | language_table(config.text_config, "model.text_model", "lm_head")


def positions(side: int) -> list[int]:
    """The position that the reference gives to each of so many patches in a row.

    It looks the share of the row up among borders, in float32: in some grids, such as 25 × 25, some patches so get
    their neighbour's.
    """
    borders = torch.arange(1 / side, 1.0, 1 / side)
    shares = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    return torch.bucketize(shares.clamp(max=1.0 - 1e-6), borders, right=True).tolist()
