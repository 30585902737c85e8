"""Pictures → pixels by an image processor: of one size, in rows with a mask where they keep their own, or in tiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from chiasm.data.dealing import in_groups
from chiasm.data.schema import ImageRef


@dataclass(frozen=True)
class Pixels:
    """`inputs`: `pixel_values` (I, 3, height, width), or (B, I, ...) with a mask, or (I, tiles, ...) with sizes, or
    patches. `tiles`: of each picture, a number, or rows and columns, behind frames where there are some, or its size
    """

    inputs: dict[str, Tensor]
    tiles: list[Any]


def keeps_sizes(image_processor: Any) -> bool:
    """Whether pictures keep their own sizes: they then come in rows, with a mask."""
    return "pixel_attention_mask" in image_processor.model_input_names


def tells_grids(image_processor: Any) -> bool:
    """Whether pictures become rows of patches, and a grid says how many are whose (Fuyu, Qwen2-VL)."""
    return "image_grid_thw" in image_processor.model_input_names


def tells_sizes(image_processor: Any) -> bool:
    """Whether pictures come in tiles of a grid that their size decides on (LLaVA-NeXT)."""
    return "image_sizes" in image_processor.model_input_names


def least_tokens(image_processor: Any, pictures: Sequence[Any]) -> int:
    """Tokens that pictures of their own resolution will have, told by their sizes before a pixel is read; 0 of others,
    and where it cannot be told."""
    count = getattr(image_processor, "get_number_of_image_patches", None)
    if count is None or not tells_grids(image_processor):
        return 0
    sizes = [picture.size for picture in pictures if isinstance(picture, Image.Image)]
    return sum(count(height, width) for width, height in sizes) // image_processor.merge_size**2


def read_pixels(image_processor: Any, flat: list[Any], counts: list[int], tiles: int | None) -> Pixels:
    """The pictures of a batch.

    Args:
        counts: pictures of each conversation.
        tiles: pictures that the image processor makes of one; None where it cuts as many as suit a picture's shape.
    """
    if not flat:
        return Pixels({}, [])
    if keeps_sizes(image_processor):
        return _rows(image_processor, flat, counts, tiles)
    if tells_sizes(image_processor):
        made = image_processor([upright(item) for item in flat], do_pad=True, return_tensors="pt")
        sized = {name: torch.as_tensor(made[name]) for name in ("pixel_values", "image_sizes")}
        return Pixels(sized, [tuple(size) for size in sized["image_sizes"].tolist()])
    if tells_grids(image_processor):
        if not getattr(image_processor, "reads_videos", False) and any(getattr(item, "ndim", 3) == 4 for item in flat):
            raise ValueError(
                f"{type(image_processor).__name__} reads pictures, and a video was given: show its frames as pictures, "
                "or give the model pixel_values_videos and video_grid_thw"
            )
        made = image_processor([upright(item) for item in flat], return_tensors="pt")
        named = {name: torch.as_tensor(made[name]) for name in ("pixel_values", "image_grid_thw")}
        return Pixels(named, [tuple(grid) for grid in named["image_grid_thw"].tolist()])
    if tiles is not None:
        return Pixels({"pixel_values": image_processor(flat, return_tensors="pt")["pixel_values"]}, [tiles] * len(flat))
    made = image_processor([upright(item) for item in flat], crop_to_patches=True, return_tensors="pt")
    return Pixels({"pixel_values": made["pixel_values"]}, [int(number) for number in made["num_patches"]])


def upright(item: Any) -> Any:
    """A picture's file, or a picture of any mode, as upright RGB, for image processors that are not ours."""
    return ImageRef.of(item).load() if isinstance(item, str | Path | Image.Image) else item


def _rows(image_processor: Any, flat: list[Any], counts: list[int], tiles: int | None) -> Pixels:
    groups = in_groups([upright(item) for item in flat], counts)
    told = {"return_row_col_info": True} if tiles is None else {}
    made = image_processor([group for group in groups if group], return_tensors="pt", **told)
    cut: list[Any] = [tiles] * len(flat)
    if tiles is None:
        down, across = ([side for group in made[name] for side in group] for name in ("rows", "cols"))
        cut = [(int(rows), int(columns)) for rows, columns in zip(down, across, strict=True)]
    rows = torch.tensor([row for row, count in enumerate(counts) if count])
    values = {name: torch.as_tensor(made[name]) for name in ("pixel_values", "pixel_attention_mask")}
    padded = {
        name: value.new_zeros(len(counts), *value.shape[1:]).index_copy(0, rows, value)
        for name, value in values.items()
    }
    return Pixels(padded, cut)
