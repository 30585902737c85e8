"""LLaVA-NeXT checkpoints of transformers → early fusion of pictures in tiles, with equal logits (2024)."""

from typing import Any

import torch
from transformers import LlavaNextConfig

from chiasm.data.processor import ChiasmProcessor
from chiasm.data.tiles import TiledProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop import llava
from chiasm.interop.parts import image_token, load_headed, load_processor
from chiasm.interop.weights import Table
from chiasm.vision.features import VisionFeatures
from chiasm.vision.probe import pair

NEWLINE = {"image_newline": "connector.image_newline", "model.image_newline": "connector.image_newline"}


def load_llava_next(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model and processor of a LLaVA-NeXT folder or hub id; no processor where its files are missing.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    model = load_headed(source, chiasm_config, table, dtype)
    options: dict[str, Any] = {"image_token": image_token(source), "token_grid": model.connector.token_grid}
    return model, load_processor(
        source, model, own_images=True, kind=TiledProcessor, add_special_tokens=True, **options
    )


def chiasm_config(config: LlavaNextConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words.

    Raises:
        ValueError: the tokens that are read of a tile fill no grid, or the tiles fill no pinpoint.
    """
    described: Any = llava.chiasm_config(config)
    tower: Any = config.vision_config
    read, size, patch = VisionFeatures.from_dict(described.features), pair(tower.image_size), pair(tower.patch_size)
    if read.grid != (size[0] // patch[0], size[1] // patch[1]) or read.num_prefix:
        raise ValueError(
            f"this LLaVA-NeXT reads vision_feature_select_strategy={config.vision_feature_select_strategy!r} of a "
            f"{tower.model_type!r} encoder, which leaves no grid of patches; expected 'default' for an encoder with a "
            "class token and 'full' for one without; transformers cannot run it either"
        )
    described.tiles = [[height // size[0], width // size[1]] for height, width in config.image_grid_pinpoints]
    for pinpoint, (rows, columns) in zip(config.image_grid_pinpoints, described.tiles, strict=True):
        if list(pinpoint) != [rows * size[0], columns * size[1]] or not rows * columns:
            raise ValueError(
                f"image_grid_pinpoints has {list(pinpoint)}, which tiles of {size[0]}×{size[1]} do not fill; "
                "transformers cannot run it either"
            )
    return described


def table(config: LlavaNextConfig) -> Table:
    """LLaVA-NeXT's names → ours, for files of any version."""
    return {**llava.table(config), **NEWLINE}
