"""Pictures → normalised pixel values of one size, on Pillow and torch alone.

Three ways to reach the size: `crop` scales the shorter side and cuts the centre out (CLIP), `squash` ignores the aspect
ratio (SigLIP), `pad` keeps all of the picture and fills up with the mean colour (LLaVA-1.5, arXiv 2310.03744).
"""

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import BatchFeature, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from chiasm.vision.encoder import VisionEncoder
from chiasm.vision.features import Grid
from chiasm.vision.pictures import to_rgb
from chiasm.vision.published import PUBLISHED, read_published

RESIZE_MODES = ("crop", "squash", "pad")
KEPT = ("image_mean", "image_std", "resample", "do_rescale", "rescale_factor", "do_normalize")
"""Settings that image processors of transformers have too."""
MACHINERY_KEYS = ("image_processor_type", "processor_class", "auto_map")
Box = tuple[float, float, float, float]

EXTREME = 64
"""An intermediate picture may have this many times the pixels that are needed; beyond, resizing takes a short cut."""


class ChiasmImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options beyond those that every image processor of transformers has."""

    resize_mode: str
    crop_fraction: float
    reducing_gap: float | None


class ChiasmImageProcessor(BaseImageProcessor):
    """Pictures of any size and mode → `pixel_values` (I, 3, height, width) in float32.

    Args:
        size: `{"height": ..., "width": ...}` in pixels, or one number for a square.
        image_mean, image_std: per channel, of values from 0 to 1.
        resize_mode: `crop`, `squash` or `pad`.
        crop_fraction: share of the scaled picture's shorter side that a crop keeps.
        resample: Pillow's filter: 2 bilinear, 3 bicubic.
        reducing_gap: None resamples exactly. A number (2 or 3) lets large pictures be shrunk cheaply to this many times
            the size first, in the JPEG decoder already: several times faster, and off by one or two levels of 255.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (transformers declares it so)
    valid_kwargs = ChiasmImagesKwargs

    def __init__(
        self,
        size: dict[str, int] | int | tuple[int, int],
        image_mean: list[float] | tuple[float, ...],
        image_std: list[float] | tuple[float, ...],
        resize_mode: str = "crop",
        crop_fraction: float = 1.0,
        resample: int = Image.Resampling.BICUBIC,
        reducing_gap: float | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        if unknown := sorted(set(kwargs) - set(MACHINERY_KEYS)):
            raise ValueError(f"image processor option {unknown[0]!r} is unknown")
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode {resize_mode!r} is unknown; choose one of {', '.join(RESIZE_MODES)}")
        if not 0 < crop_fraction <= 1:
            raise ValueError(f"crop_fraction is {crop_fraction}; expected a number above 0 and not above 1")
        if len(image_mean) != 3 or len(image_std) != 3:
            raise ValueError(f"image_mean {image_mean} and image_std {image_std} need three numbers each")
        super().__init__()
        self.size = _size(size)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.resize_mode, self.crop_fraction = resize_mode, crop_fraction
        self.resample, self.reducing_gap = int(resample), reducing_gap
        self.do_rescale, self.rescale_factor, self.do_normalize = do_rescale, rescale_factor, do_normalize

    def preprocess(self, images: Any, return_tensors: str = "pt", **overrides: Any) -> BatchFeature:
        """`pixel_values` (I, 3, height, width) of one picture or a list of them, in float32.

        Args:
            images: one or a list of what `chiasm.vision.pictures.to_rgb` takes: paths, PIL pictures, arrays, tensors.
                An array or tensor with four dimensions is a batch.
            return_tensors: `pt` or `np`.
            **overrides: this processor's fields, for this call.
        """
        if overrides := {name: value for name, value in overrides.items() if value is not None}:
            return type(self)(**self.to_dict() | overrides).preprocess(images, return_tensors)
        pictures = _flatten(images)
        height, width = self.size["height"], self.size["width"]
        pixels = np.empty((len(pictures), height, width, 3), dtype=np.uint8)
        for index, picture in enumerate(pictures):
            pixels[index] = np.asarray(self.resize(picture))
        scale, shift = self._affine()
        values = np.multiply(pixels.transpose(0, 3, 1, 2), scale, order="C")
        values += shift
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors {return_tensors!r} is unknown; choose one of pt, np")
        return BatchFeature({"pixel_values": torch.from_numpy(values) if return_tensors == "pt" else values})

    def _affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Factor and summand per channel that rescale and normalise in one go."""
        scale = np.full((3, 1, 1), self.rescale_factor if self.do_rescale else 1.0)
        shift = np.zeros((3, 1, 1))
        if self.do_normalize:
            std = np.reshape(self.image_std, (3, 1, 1))
            scale, shift = scale / std, -np.reshape(self.image_mean, (3, 1, 1)) / std
        return scale.astype(np.float32), shift.astype(np.float32)

    def resize(self, picture: Any) -> Image.Image:
        """One picture as RGB of the processor's size: what the encoder sees before normalisation."""
        target = (self.size["height"], self.size["width"])
        draft = None if self.reducing_gap is None else int(self.reducing_gap * max(target) / self.crop_fraction)
        rgb = to_rgb(picture, draft)
        if self.resize_mode == "squash":
            return self._scale(rgb, target)
        return self._crop(rgb, target) if self.resize_mode == "crop" else self._pad(rgb, target)

    def _scale(self, picture: Image.Image, size: Grid, box: Box | None = None) -> Image.Image:
        return picture.resize((size[1], size[0]), self.resample, box, self.reducing_gap)

    def _crop(self, picture: Image.Image, size: Grid) -> Image.Image:
        (height, width), (rows, columns) = size, (picture.height, picture.width)
        if rows * width <= columns * height:
            scaled_height = self.shortest(height)
            scaled_width = max(int(scaled_height * columns / rows), width)
        else:
            scaled_width = self.shortest(width)
            scaled_height = max(int(scaled_width * rows / columns), height)
        top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
        if scaled_height * scaled_width > EXTREME * height * width:
            x, y = columns / scaled_width, rows / scaled_height
            right, bottom = min((left + width) * x, columns), min((top + height) * y, rows)
            return self._scale(picture, size, (left * x, top * y, right, bottom))
        scaled = self._scale(picture, (scaled_height, scaled_width))
        return scaled.crop((left, top, left + width, top + height))

    def shortest(self, side: int) -> int:
        """Pixels of the scaled picture's shorter side, of which a crop keeps `side`: rounded down, but for a quotient
        that is a whole number except for rounding (384 / (384 / 450))."""
        return int(round(side / self.crop_fraction, 6))

    @property
    def margin(self) -> tuple[int, int, int]:
        """The colour of what `pad` adds: the mean colour."""
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        return red, green, blue

    def _pad(self, picture: Image.Image, size: Grid) -> Image.Image:
        (height, width), (rows, columns) = size, (picture.height, picture.width)
        if columns * height >= rows * width:
            canvas = (max(round(columns * height / width), rows), columns)
        else:
            canvas = (rows, max(round(rows * width / height), columns))
        if canvas[0] * canvas[1] > EXTREME * rows * columns:
            scale = min(height / rows, width / columns)
            picture = self._scale(picture, (max(round(rows * scale), 1), max(round(columns * scale), 1)))
            return self._on_mean_colour(picture, size)
        return self._scale(self._on_mean_colour(picture, canvas), size)

    def _on_mean_colour(self, picture: Image.Image, canvas: Grid) -> Image.Image:
        if canvas == (picture.height, picture.width):
            return picture
        padded = Image.new("RGB", (canvas[1], canvas[0]), self.margin)
        padded.paste(picture, ((canvas[1] - picture.width) // 2, (canvas[0] - picture.height) // 2))
        return padded


def image_processor_for(
    source: str | os.PathLike | PreTrainedModel | None,
    encoder: VisionEncoder,
    resize_mode: str | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
) -> ChiasmImageProcessor:
    """The image processor that an encoder was trained with, at the encoder's image size.

    Args:
        source: folder or hub id whose preprocessor_config.json is read. Without one, the values that the encoder's
            type was published with are taken.
        resize_mode: `crop`, `squash` or `pad` instead of the encoder's own.
        image_mean, image_std: instead of the encoder's own.

    Raises:
        ValueError: nothing is known of this type of encoder, or its processing is of a kind that Chiasm does not have.
    """
    model_type = encoder.model.config.model_type
    fields = {**PUBLISHED.get(model_type, {}), **read_published(source)}
    given = {"resize_mode": resize_mode, "image_mean": image_mean, "image_std": image_std}
    fields |= {name: value for name, value in given.items() if value is not None}
    if "image_mean" not in fields or "image_std" not in fields:
        raise ValueError(
            f"how pictures are normalised for a {model_type!r} encoder is not known and no preprocessor_config.json "
            "says it; pass image_mean= and image_std="
        )
    height, width = encoder.image_size
    return ChiasmImageProcessor(**fields | {"size": {"height": height, "width": width}})


def _size(size: dict[str, int] | int | tuple[int, int]) -> dict[str, int]:
    if isinstance(size, dict):
        if set(size) != {"height", "width"}:
            raise ValueError(f"size {size} is not understood; expected {{'height': ..., 'width': ...}}")
        return {"height": int(size["height"]), "width": int(size["width"])}
    height, width = (size, size) if isinstance(size, int) else size
    return {"height": height, "width": width}


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [picture for part in images for picture in _flatten(part)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]
