"""Raw pixels as patches of any resolution and aspect ratio, each embedded by one linear layer (Fuyu, 2023).

There is no vision encoder: the transformer that reads text reads these patches too.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from chiasm.vision.pictures import to_rgb

MACHINERY_KEYS = ("image_processor_type", "processor_class", "auto_map")


class PatchConfig(PreTrainedConfig):
    """Sizes of a patch embedding.

    Args:
        hidden_size: D_l, the transformer's width.
        image_size: height and width of the picture that a cost is told for; any other is read as well.
    """

    model_type = "chiasm_patches"

    patch_size: int = 16
    hidden_size: int = 256
    image_size: list | tuple = (224, 224)
    initializer_range: float = 0.02


class PatchEmbedding(PreTrainedModel):
    """Patches `(P, 3 · patch_size²)` → `(P, D_l)`."""

    config_class = PatchConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # no attention: each implementation suits
    kind = "patches"

    def __init__(self, config: PatchConfig) -> None:
        super().__init__(config)
        self.projection = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.post_init()

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.config.image_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture of `image_size`."""
        height, width = self.image_size
        return math.ceil(height / self.config.patch_size), math.ceil(width / self.config.patch_size)

    def flops(self) -> int:
        """Of a picture of `image_size`."""
        return 2 * self.grid[0] * self.grid[1] * self.projection.weight.numel()

    def forward(self, patches: Float[Tensor, "P pixels"]) -> Float[Tensor, "P D_l"]:
        return self.projection(patches.to(self.projection.weight.dtype))


class PatchImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options beyond those that every image processor of transformers has."""

    patch_size: int
    max_patches: int


class PatchImageProcessor(BaseImageProcessor):
    """Pictures of any size → `pixel_values` (P, 3 · patch_size²), all patches in a row, and `image_grid_thw` (I, 3).

    Args:
        patch_size: pixels of a patch's side.
        max_patches: a picture with more is shrunk, its aspect ratio kept; None for no limit.
        max_size: `{"height": ..., "width": ...}` that a picture is shrunk to fit into, its aspect ratio kept.
        size: `{"height": ..., "width": ...}` that every picture is resized to, where sizes shall not be kept.
        image_mean, image_std: per channel, of values from 0 to 1.
        padding: the value, from 0 to 255, of what a picture lacks on the right and below.
        resample: how pictures are resized, as Pillow numbers it.
    """

    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012  (transformers declares it so)
    valid_kwargs = PatchImagesKwargs
    reads_videos = True

    def __init__(
        self,
        patch_size: int = 16,
        max_patches: int | None = 196,
        max_size: dict[str, int] | None = None,
        size: dict[str, int] | None = None,
        image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        padding: int = 255,
        resample: int = Image.Resampling.BICUBIC,
        **kwargs: Any,
    ) -> None:
        if unknown := sorted(set(kwargs) - set(MACHINERY_KEYS)):
            raise ValueError(f"image processor option {unknown[0]!r} is unknown")
        if patch_size < 1 or (max_patches is not None and max_patches < 1):
            raise ValueError(f"patch_size={patch_size}, max_patches={max_patches}; expected at least 1")
        super().__init__()
        self.patch_size, self.max_patches = patch_size, max_patches
        self.max_size, self.size = max_size, size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.padding, self.resample = int(padding), int(resample)

    def preprocess(self, images: Any, return_tensors: str = "pt", **overrides: Any) -> BatchFeature:
        """Patches of one picture or a list of them; an array or tensor with four dimensions is a video's frames."""
        if overrides := {name: value for name, value in overrides.items() if value is not None}:
            return type(self)(**self.to_dict() | overrides).preprocess(images, return_tensors)
        videos = [self._frames(item) for item in (images if isinstance(images, list | tuple) else [images])]
        grids = [self.grid_of(frames) for frames in videos]
        made = [self._patches(frame, grid) for frames, grid in zip(videos, grids, strict=True) for frame in frames]
        return BatchFeature({"pixel_values": torch.cat(made), "image_grid_thw": torch.tensor(grids)})

    def grid_of(self, picture: Any) -> tuple[int, int, int]:
        """Frames, rows and columns of a picture or a list of frames."""
        frames = picture if isinstance(picture, list) else self._frames(picture)
        height, width = self._resized(frames[0])
        return len(frames), math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    @staticmethod
    def _frames(item: Any) -> list[Image.Image]:
        if isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 4:
            return [to_rgb(frame) for frame in item]
        return [to_rgb(item)]

    def _resized(self, picture: Image.Image) -> tuple[int, int]:
        """Height and width that a picture is shrunk to, so that it has no more than `max_patches`."""
        if self.size is not None:
            return self.size["height"], self.size["width"]
        height, width = picture.height, picture.width
        if self.max_size is not None:
            shrink = min(self.max_size["height"] / height, self.max_size["width"] / width, 1.0)
            height, width = max(int(height * shrink), 1), max(int(width * shrink), 1)
        if self.max_patches is None:
            return height, width
        while (count := math.ceil(height / self.patch_size) * math.ceil(width / self.patch_size)) > self.max_patches:
            shrink = min(math.sqrt(self.max_patches / count), 0.98)
            if min(height, width) <= self.patch_size:
                height, width = (height, int(width * shrink)) if width > height else (int(height * shrink), width)
            else:
                height, width = max(int(height * shrink), 1), max(int(width * shrink), 1)
        return height, width

    def _patches(self, picture: Image.Image, grid: tuple[int, int, int]) -> Float[Tensor, "P pixels"]:
        """One frame's patches in raster order, channels last."""
        (_, rows, columns), side = grid, self.patch_size
        height, width = self._resized(picture)
        if (picture.height, picture.width) != (height, width):
            picture = picture.resize((width, height), Image.Resampling(self.resample))
        canvas = np.full((rows * side, columns * side, 3), self.padding, dtype=np.uint8)
        canvas[:height, :width] = np.asarray(picture)[: rows * side, : columns * side]
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (self.image_mean, self.image_std))
        values = (torch.from_numpy(canvas).float() / 255 - mean) / std
        return values.unflatten(0, (rows, side)).unflatten(2, (columns, side)).transpose(1, 2).reshape(-1, 3 * side**2)
