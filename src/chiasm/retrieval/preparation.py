"""How a model prepares pictures and texts, which decides its vectors as its weights do: seen on samples of both."""

import hashlib
from typing import Any

import numpy as np
from PIL import Image

SIDES = ((97, 73), (300, 520))
"""Width and height of the pictures that are tried: smaller than most models see them, and larger."""
TEXTS = ("a red car", "A Red Car?", "두 마리의 고양이", "naïve façade 🙂 #42", "words " * 200)
VALUES = 24
"""Numbers of each prepared picture that are remembered."""
TOLERANCE = 0.03
"""Less than any other size, crop, mean or way to resize changes them; more than another release of one does."""

Preparation = dict[str, Any]


def preparation_of(processor: Any) -> Preparation:
    """What a processor makes of the samples: shapes and a few values of pictures, a digest of the texts' tokens."""
    pixels = [np.asarray(processor(images=[_speckled(*side)])["pixel_values"], dtype=np.float64) for side in SIDES]
    some = [values.ravel()[np.linspace(0, values.size - 1, VALUES).astype(int)] for values in pixels]
    tokens = [{name: tensor.tolist() for name, tensor in sorted(processor(text=[text]).items())} for text in TEXTS]
    return {
        "shapes": [list(values.shape[1:]) for values in pixels],
        "values": [[round(value, 4) for value in values.tolist()] for values in some],
        "texts": hashlib.sha256(repr(tokens).encode()).hexdigest(),
    }


def difference(before: Preparation, now: Preparation) -> str | None:
    """What is prepared otherwise, in words; None if nothing is."""
    for was, shape in zip(before["shapes"], now["shapes"], strict=True):
        if shape != was:
            return f"makes pictures of shape {shape}, not {was}"
    if not np.allclose(before["values"], now["values"], rtol=0, atol=TOLERANCE):
        return "resizes, crops or normalises pictures in another way"
    return None if before["texts"] == now["texts"] else "makes other tokens of texts"


def _speckled(width: int, height: int) -> Image.Image:
    """A picture whose every pixel tells its place."""
    rows, columns, channels = np.indices((height, width, 3))
    values = (rows * 37 + columns * 101 + channels * 59 + rows * columns * 7) % 256 // 2 + rows * 127 // height
    return Image.fromarray(values.astype(np.uint8))
