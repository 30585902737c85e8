"""LLaVA-NeXT's image processor for an encoder: the whole picture, squashed, and the tiles of one of several grids."""

from collections.abc import Sequence

from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from chiasm.vision.features import Grid
from chiasm.vision.image_processor import KEPT, ChiasmImageProcessor


def tile_processor(images: ChiasmImageProcessor, tiles: Sequence[Grid]) -> LlavaNextImageProcessorPil:
    """Pictures → `pixel_values` (I, tiles, 3, height, width) and `image_sizes` (I, 2), normalised as by `images`.

    Args:
        images: of the encoder; its `resize_mode` is not used.
        tiles: rows and columns of the grids to choose from.

    Raises:
        ValueError: the encoder takes pictures that are no squares.
    """
    side = images.size["height"]
    if side != images.size["width"]:
        raise ValueError(
            f"tiles are squares, but this encoder takes pictures of {side}×{images.size['width']}; "
            "connect with a square image_size"
        )
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in tiles],
        **{name: getattr(images, name) for name in KEPT},
    )
