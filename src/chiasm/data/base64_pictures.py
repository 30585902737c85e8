"""Pictures that stand in text, as base64: by itself, or in a data URL."""

import base64
import io

from PIL import Image, UnidentifiedImageError

from chiasm.rgb import DAMAGE

DATA_URL = "data:"


def decoded(text: str) -> bytes:
    """The bytes of base64, with or without a data URL's beginning. ValueError for text that is none."""
    try:
        return base64.b64decode("".join(text.partition(",")[2].split() or text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"is not base64 ({error})") from None


def picture_in(text: str) -> bytes | None:
    """The picture that a text without a beginning is in base64, told by its first bytes; None for other text."""
    try:
        encoded = decoded(text)
        with Image.open(io.BytesIO(encoded)):
            return encoded
    except Image.DecompressionBombError:
        return encoded
    except (UnidentifiedImageError, *DAMAGE):
        return None
