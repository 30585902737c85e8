"""Any Pillow picture → 8-bit RGB, upright and opaque: the one conversion that data and vision share."""

import struct
import zlib

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


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to upright RGB; transparent pixels become white, 16-bit grey keeps its upper 8 bits. The picture
    itself where it is all that."""
    picture = _upright(picture)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save the picture with 8 bits per channel")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.int64)
        grey = grey // 256 if picture.mode != "I" or grey.max(initial=0) > 255 else grey
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture if picture.mode == "RGB" else picture.convert("RGB")


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
