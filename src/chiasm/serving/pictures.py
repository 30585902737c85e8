"""Pictures of requests: decoded only where their header names a raster format and a size within the limits."""

import base64
import binascii
import warnings
from io import BytesIO

from PIL import Image

from chiasm.serving.body import Lease
from chiasm.serving.errors import ApiError
from chiasm.serving.jpeg import survey
from chiasm.serving.settings import Limits
from chiasm.vision.pictures import to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DECODING, WEBP_DECODING, DECODED = 12, 22, 4
"""Bytes that a pixel takes, while a picture is decoded and as it is kept; WebP's decoder has frames of its own."""
READS = 50_000
"""Pieces that a file is read in, each of them a step in Python; a real one of 24 MB takes a few thousand."""
RLE = (1, 2)
"""Run-length compressions of BMP, which Pillow unpacks in Python, pixel by pixel."""
ESCAPED = {"%2B": "+", "%2b": "+", "%2F": "/", "%2f": "/", "%3D": "=", "%3d": "="}
"""How a URL may write what base64 has beside letters and digits."""


def load(source: str | bytes, limits: Limits, param: str, lease: Lease) -> Image.Image:
    """The picture of a data URL or a file's bytes in RGB.

    Args:
        lease: has the memory that it needs while it is decoded, and then that of the picture.

    Raises:
        ApiError: it is no picture, or has too many pixels.
    """
    data = from_data_url(source, param) if isinstance(source, str) else source
    count, each = pixels(data, limits, param), WEBP_DECODING if data.startswith(b"RIFF") else DECODING
    lease.take(each * count)
    picture = decode(data, param)
    lease.give((each - DECODED) * count)
    return picture


def from_data_url(url: str, param: str) -> bytes:
    """The bytes of `data:image/...;base64,...`; spaces, escapes and a missing `=` are as browsers read them."""
    head, comma, data = url.partition(",")
    kind = "".join(head.lower().split())
    if not comma or not kind.startswith("data:") or not kind.endswith(";base64"):
        raise invalid("expected data:image/png;base64,... with the picture's bytes in base64", param)
    for escape, letter in ESCAPED.items():
        data = data.replace(escape, letter)
    try:
        letters = data.encode("ascii").translate(None, b" \t\n\f\r")
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise invalid("its data is not base64", param) from None


def pixels(data: bytes, limits: Limits, param: str) -> int:
    """How many pixels a picture says that it has, without decoding any.

    Raises:
        ApiError: it is no picture, or has too many.
    """
    with _open(data, param) as picture:
        width, height = picture.size
    if width * height > limits.pixels:
        raise invalid(f"{width} × {height} pixels are more than {limits.pixels:,}", param)
    if max(width, height) > limits.side_ratio * max(1, min(width, height)):
        raise invalid(f"{width} × {height}: one side is more than {limits.side_ratio} times the other", param)
    return width * height


def decode(data: bytes, param: str) -> Image.Image:
    """The picture in RGB; of a moving one the first frame."""
    with _open(data, param) as picture:
        try:
            rgb = to_rgb(picture)
            rgb.load()
        except (MemoryError, ApiError):
            raise
        except Exception as error:  # decoders raise whatever they like on broken files
            raise invalid(f"it is broken: {error}", param) from None
        plain = rgb.copy() if rgb is picture else rgb
    plain.info.clear()  # profiles and comments
    return plain


class _Counted(BytesIO):
    """A file that may be read in so many pieces only."""

    def __init__(self, data: bytes, param: str) -> None:
        super().__init__(data)
        self.reads, self.param = 0, param

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > READS:
            raise _too_many_pieces(self.param)
        return super().read(size)


def _open(data: bytes, param: str) -> Image.Image:
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data, param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(_Counted(data, param), formats=FORMATS)
    except ApiError:
        raise
    except Image.DecompressionBombError:
        raise invalid("it has too many pixels", param) from None
    except Exception:
        known = ", ".join(FORMATS)
        raise invalid(f"it is none of {known}; other formats, such as SVG or PDF, are not read", param) from None
    if picture.format == "BMP" and picture.info.get("compression") in RLE:
        raise invalid("its BMP is run-length encoded; save it uncompressed, or as PNG", param)
    return picture


def _check_jpeg(data: bytes, param: str) -> None:
    found = survey(data, READS)
    if found.pieces > READS:
        raise _too_many_pieces(param)
    if (excess := found.excess()) is not None:
        raise invalid(f"its JPEG has {excess}", param)


def _too_many_pieces(param: str) -> ApiError:
    return invalid(f"it is cut into more than {READS:,} pieces; save it anew", param)


def invalid(reason: str, param: str) -> ApiError:
    return ApiError(400, f"Invalid image: {reason}.", param=param, code="invalid_image")
