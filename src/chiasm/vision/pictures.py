"""Anything that is a picture → 8-bit RGB, upright and opaque."""

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from chiasm import rgb


def to_rgb(picture: Any, draft: int | None = None) -> Image.Image:
    """A picture as RGB: turned as its EXIF orientation says, transparency laid on white.

    Args:
        picture: a file, a PIL picture of any mode, an array (height, width[, channels]) or a tensor
            ([channels,] height, width); whole numbers count from 0 to 255, fractions from 0 to 1.
        draft: a JPEG file may be decoded at 1/2, 1/4 or 1/8 as long as both sides keep this many pixels.

    Raises:
        ValueError: it is not a picture.
    """
    if isinstance(picture, str | os.PathLike):
        return to_rgb(_open(picture, draft))
    if isinstance(picture, torch.Tensor):
        return to_rgb(Image.fromarray(_to_bytes(picture.detach().cpu().numpy(), channels_first=True)))
    if isinstance(picture, np.ndarray):
        return to_rgb(Image.fromarray(_to_bytes(picture, channels_first=False)))
    if not isinstance(picture, Image.Image):
        raise ValueError(f"a {type(picture).__name__} is not a picture; give a path, a PIL picture, array or tensor")
    return rgb.to_rgb(picture)


def _open(path: str | os.PathLike, draft: int | None) -> Image.Image:
    try:
        picture = Image.open(path)
        if draft is not None:
            picture.draft("RGB", (draft, draft))
        picture.load()
    except (*rgb.DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return picture


def _to_bytes(values: NDArray[Any], channels_first: bool) -> NDArray[np.uint8]:
    shape = values.shape
    if values.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if first and (channels_first or not last):
            values = values.transpose(1, 2, 0)
        elif not last:
            raise ValueError(f"an array of shape {shape} is not a picture; 1, 3 or 4 channels were expected")
        values = values[:, :, 0] if values.shape[2] == 1 else values
    if values.ndim not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of shape {shape} is not a picture; (height, width, 3) was expected")
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if np.issubdtype(values.dtype, np.integer):
        limit, scale = 255, 1
    else:
        limit, scale = 1, 255
    if values.min() < 0 or values.max() > limit:
        raise ValueError(
            f"a picture of {values.dtype} has values from {values.min()} to {values.max()}; expected 0 to {limit}"
        )
    return np.rint(values * np.float32(scale)).astype(np.uint8)
