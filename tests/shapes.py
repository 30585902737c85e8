"""Artwork for emoji scenes without Twemoji: one coloured shape for every object of the vocabulary."""

from pathlib import Path

from PIL import Image, ImageDraw

from chiasm.data.dice import Dice
from chiasm.data.emoji_vocabulary import OBJECTS, UNSEEN_OBJECTS


def draw_artwork(folder: Path) -> Path:
    """A 72 x 72 PNG for each object, in `folder`; every one is a different polygon."""
    folder.mkdir(parents=True, exist_ok=True)
    for code in (*OBJECTS, *UNSEEN_OBJECTS):
        dice = Dice("artwork", code)
        picture = Image.new("RGBA", (72, 72))
        corners = [(dice.below(72), dice.below(72)) for _ in range(6)]
        colour = (dice.below(256), dice.below(256), dice.below(256), 255)
        ImageDraw.Draw(picture).polygon(corners, fill=colour, outline="black")
        picture.save(folder / f"{code}.png")
    return folder
