"""An emoji scene and its picture: 224 x 224 pixels of one colour, up to four objects, perhaps a sign with a text."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from chiasm.data.dice import Dice
from chiasm.data.emoji_vocabulary import CORNERS, MIDDLE

SIDE = 224
SIGN_HEIGHT = 48
OUTLINE = 2
SIZES = tuple(range(64, 101, 4))
SIZES_BESIDE_SIGN = tuple(range(64, 85, 4))
EXACT_SIZE = 84

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Placed:
    """One object: its code point, the place it is in, and the square that its artwork fills."""

    code: str
    place: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """All there is to see. `shade` is the exact RGB of the background's `colour`."""

    colour: str
    shade: tuple[int, int, int]
    objects: tuple[Placed, ...]
    sign: str | None = None
    sign_on_top: bool = False


def box_in(place: str, dice: Dice, sign: bool, sign_on_top: bool) -> Box:
    """A square of random size at a random spot inside `place`, clear of the sign and of the other places."""
    left, top, right, bottom = _region(place, SIGN_HEIGHT if sign else 0, sign_on_top)
    size = dice.pick(SIZES_BESIDE_SIGN if sign else SIZES)
    x = left + OUTLINE + dice.below(right - left - size - 2 * OUTLINE + 1)
    y = top + OUTLINE + dice.below(bottom - top - size - 2 * OUTLINE + 1)
    return x, y, x + size, y + size


def exact_box(place: str, sign: bool, sign_on_top: bool) -> Box:
    """The square of `EXACT_SIZE` in the middle of `place`."""
    left, top, right, bottom = _region(place, SIGN_HEIGHT if sign else 0, sign_on_top)
    x, y = (left + right - EXACT_SIZE) // 2, (top + bottom - EXACT_SIZE) // 2
    return x, y, x + EXACT_SIZE, y + EXACT_SIZE


def _region(place: str, taken: int, sign_on_top: bool) -> Box:
    top, height = (taken if sign_on_top else 0), SIDE - taken
    if place == MIDDLE:
        half = 62 if not taken else 58
        return SIDE // 2 - half, top + height // 2 - half, SIDE // 2 + half, top + height // 2 + half
    row, column = divmod(CORNERS.index(place), 2)
    top += row * height // 2
    return column * SIDE // 2, top, (column + 1) * SIDE // 2, top + height // 2


@dataclass(frozen=True)
class Drawing:
    """A scene with its artwork folder: draws the picture when called, and can be sent to another process."""

    scene: Scene
    artwork: Path

    def __call__(self) -> Image.Image:
        picture = Image.new("RGB", (SIDE, SIDE), self.scene.shade)
        for placed in self.scene.objects:
            left, top, right, _ = placed.box
            sprite = _sprite(self.artwork, placed.code, right - left)
            picture.paste(sprite, (left - OUTLINE, top - OUTLINE), sprite)
        if self.scene.sign is not None:
            picture.paste(_sign(self.scene.sign), (0, 0 if self.scene.sign_on_top else SIDE - SIGN_HEIGHT))
        return picture


@lru_cache(maxsize=2048)
def _sprite(artwork: Path, code: str, size: int) -> Image.Image:
    """The object in a `size` x `size` square, with a white outline around it that lets it stand out on any colour."""
    file = artwork / f"{code}.png"
    if not file.is_file():
        raise ValueError(f"artwork {artwork}: no file {file.name}; expected Twemoji's 72x72 PNGs, named by code point")
    with Image.open(file) as source:
        art = source.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    sprite = Image.new("RGBA", (size + 2 * OUTLINE, size + 2 * OUTLINE), (255, 255, 255, 0))
    sprite.paste(art, (OUTLINE, OUTLINE))
    outline = sprite.getchannel("A").filter(ImageFilter.MaxFilter(2 * OUTLINE + 1))
    white = Image.new("RGBA", sprite.size, "white")
    white.putalpha(outline)
    return Image.alpha_composite(white, sprite)


def _sign(text: str) -> Image.Image:
    """Black text on a white strip as wide as the picture."""
    sign = Image.new("RGB", (SIDE, SIGN_HEIGHT), "white")
    ImageDraw.Draw(sign).text((SIDE / 2, SIGN_HEIGHT / 2), text, "black", _font(), anchor="mm")
    return sign


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(38)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("this Pillow was built without FreeType, so it cannot write signs: install Pillow's own wheel")
    return font
