"""Any Pillow picture → 8-bit RGB, upright and opaque: the one conversion that data and vision share."""

import struct
import zlib
from collections.abc import Callable
from typing import cast

import numpy as np
from PIL import ExifTags, Image

DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error)
"""What Pillow raises for bytes that are not what they should be."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an EXIF orientation."""
ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Where a picture's `info` says how it is turned."""
ROWS = 64
"""That are changed at a time."""


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to upright RGB; transparent pixels become white, 16-bit grey keeps its upper 8 bits. The picture
    itself where it is all that."""
    picture = _upright(picture)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save the picture with 8 bits per channel")
    if picture.mode.startswith("I"):
        wide = picture.mode != "I" or cast(tuple[float, float], picture.getextrema())[1] > 255
        return _in_bands(picture, lambda band: _eight_bits(band, 8 * wide))
    if picture.has_transparency_data:
        return _in_bands(picture, lambda band: band.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _in_bands(picture: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The picture on white, changed some rows at a time: a whole picture between them would cost its memory again."""
    white = Image.new("RGB", picture.size, "white")
    for top in range(0, picture.height, ROWS):
        band = change(picture.crop((0, top, picture.width, min(top + ROWS, picture.height))))
        white.paste(band, (0, top), band if band.mode == "RGBA" else None)
    return white


def _eight_bits(grey: Image.Image, shift: int) -> Image.Image:
    return Image.fromarray((np.asarray(grey) >> shift).clip(0, 255).astype(np.uint8))


def _upright(picture: Image.Image) -> Image.Image:
    """The picture turned by its EXIF orientation, which it no longer tells; a block that cannot be read leaves good
    pixels as they are. A TIFF is turned by Pillow while it is read, and no longer tells it afterwards."""
    picture.load()
    try:
        turn = UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        turn = None
    if turn is None and not any(name in picture.info for name in ORIENTED):
        return picture
    turned = picture.copy() if turn is None else picture.transpose(turn)
    for name in ORIENTED:
        turned.info.pop(name, None)
    return turned
