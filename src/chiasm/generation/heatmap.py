"""Weights over a grid of patches as pictures: in colour where the weight is, behind a grey veil elsewhere."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 224
"""Pixels of the longer side of a tile."""
COLUMNS = 6
GAP = 14
CAPTION = 34
FONT_SIZE = 20
PAPER, INK = "#ffffff", "#1c1c1c"
VEIL, VEIL_SHARE = 128, 0.65
"""A grey that stands out from light and dark pictures alike, and how much of it covers what was not looked at."""
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NanumGothic.ttf", "AppleSDGothicNeo.ttc", "malgun.ttf", "DejaVuSans.ttf")
"""Tried in turn for words that are not Latin."""


def spotlight(picture: Image.Image, weights: Float[Tensor, "rows columns"]) -> Image.Image:
    """The picture as it is where the weights are largest, fading to grey where they are smallest.

    Differences that are smaller than an equal share are shown as faint as they are, on a picture that is half lit where
    all weights are equal: what was looked at evenly is not what was not looked at.
    """
    low, high = weights.min(), weights.max()
    span = (high - low).clamp(min=weights.sum() / weights.numel()).clamp(min=1e-12)
    even = 1 - (high - low) / span if high > 0 else torch.zeros(())
    light = ((weights - low) / span + even / 2).clamp(0, 1)
    mask = Image.fromarray((light.numpy() * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    grey = picture.convert("L")
    veiled = Image.blend(grey, Image.new("L", grey.size, VEIL), VEIL_SHARE).convert("RGB")
    return Image.composite(picture, veiled, mask)


def words(tokens: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Pieces of text put together to words, each with the indices of its pieces."""
    found: list[tuple[str, list[int]]] = []
    closed = True
    for index, token in enumerate(tokens):
        if token[:1].isspace():
            closed = True
        if token and not token.strip():
            continue
        if closed:
            found.append(("", []))
        text, rows = found[-1]
        found[-1] = (text + token.strip(), [*rows, index])
        closed = token[-1:].isspace()
    return found


def grid(tiles: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures side by side, each with its word under it."""
    scale = SIDE / max(tiles[0][0].size)
    width, height = (round(side * scale) for side in tiles[0][0].size)
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    size = (GAP + columns * (width + GAP), GAP + rows * (height + CAPTION + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, word) in enumerate(tiles):
        row, column = divmod(number, columns)
        left, top = GAP + column * (width + GAP), GAP + row * (height + CAPTION + GAP)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        centre = (left + width / 2, top + height + CAPTION / 2)
        font = _font(word)
        draw.text(centre, _fitting(word, font, width), INK, font, anchor="mm")
    return sheet


def _fitting(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(word) <= width:
        return word
    return next((f"{word[:end]}…" for end in range(len(word), 0, -1) if font.getlength(f"{word[:end]}…") <= width), "…")


def _font(word: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if not word.isascii():
        for name in WIDE_FONTS:
            try:
                return ImageFont.truetype(name, FONT_SIZE)
            except OSError:
                continue
    return ImageFont.load_default(FONT_SIZE)
