"""Emoji names: every emoji of the Twemoji artwork with its name in one of many languages (Unicode CLDR).

What retrieval and zero-shot classification are measured by. `train` and `test` share no emoji; other views of an emoji
are pictures that a model which learned its name has not seen.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import emoji
from PIL import Image

from chiasm import sources
from chiasm.data.dice import Dice
from chiasm.data.schema import ImageRef, Sample, Samples
from chiasm.data.splits import Subset

SPLITS = ("all", "train", "test")
SIDE, DRAWN = 224, 176
SIDES, TILT, SHADE = range(112, 193), 20, 40
"""Of other views: the art's side, the largest tilt in degrees, and how far the paper may be from white."""
PAPER = (236, 236, 232)
QUESTION = {"en": "What is this?", "ko": "이것은 무엇입니까?"}


class EmojiNames(Samples):
    """A picture and a name for each emoji, or several pictures.

    Args:
        split: "all", "test" (a tenth, by a hash of the code point) or "train" (the others).
        language: of the names, a language of the package `emoji`, such as "en" or "ko".
        size: at most so many emoji, evenly spread.
        seed: of views, which differ in size, place, tilt and paper; None is the plain one, in the middle.
        views: pictures of each emoji; more than one need a seed.
        artwork: folder of the 72x72 PNGs; None is the alias `twemoji`, fetched once.
    """

    OPTIONS = ("language", "size", "artwork", "seed", "views")

    def __init__(
        self,
        split: str = "all",
        language: str = "en",
        size: int | None = None,
        artwork: str | Path | None = None,
        seed: int | None = None,
        views: int = 1,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        if language not in emoji.LANGUAGES:
            raise ValueError(f"language is {language!r}, expected one of {', '.join(emoji.LANGUAGES)}")
        for name, value in (("size", size), ("views", views)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number above 0")
        if views > 1 and seed is None:
            raise ValueError(f"views is {views}, but without a seed there is one view alone; add seed=0")
        folder = Path(sources.resolve("twemoji") if artwork is None else artwork)
        self.artwork = folder / "72x72" if (folder / "72x72").is_dir() else folder
        self.split, self.language, self.seed, self.views = split, language, seed, views
        known = {path.stem for path in self.artwork.glob("*.png")}
        codes = [code for code in _names(language) if code in known and split in ("all", _split_of(code))]
        self.codes = codes if size is None else [codes[i * len(codes) // size] for i in range(min(size, len(codes)))]

    def __len__(self) -> int:
        return len(self.codes) * self.views

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        number, view = divmod(range(len(self))[index], self.views)
        code = self.codes[number]
        name, look = f"{code}-{self.language}", PLAIN
        if self.seed is not None:
            name, look = f"{name}-{self.seed}-{view}", Look.of(code, self.seed, view)
        question = QUESTION.get(self.language, QUESTION["en"])
        messages: list[dict] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": _names(self.language)[code]},
        ]
        picture = ImageRef.of(OnPaper(self.artwork / f"{code}.png", look), f"of emoji {code}")
        return Sample(name, messages, [picture], "naming", {"emoji": code, "split": self.split})


@dataclass(frozen=True)
class Look:
    """How an emoji lies on its paper: side and upper left corner in pixels, tilt in degrees, and the colour."""

    side: int = DRAWN
    left: int = (SIDE - DRAWN) // 2
    top: int = (SIDE - DRAWN) // 2
    tilt: int = 0
    paper: tuple[int, ...] = PAPER

    @classmethod
    def of(cls, *seed: str | int) -> "Look":
        """Another view."""
        dice = Dice("emoji names", *seed)
        side = dice.pick(SIDES)
        left, top = (dice.below(SIDE - side + 1) for _ in range(2))
        tilt, paper = dice.below(2 * TILT + 1) - TILT, tuple(255 - dice.below(SHADE) for _ in range(3))
        return cls(side, left, top, tilt, paper)


PLAIN = Look()


@dataclass(frozen=True)
class OnPaper:
    """One emoji on a light square: draws the picture when called, and can be sent to another process."""

    file: Path
    look: Look = PLAIN

    def __call__(self) -> Image.Image:
        look = self.look
        with Image.open(self.file) as source:
            art = source.convert("RGBA").resize((look.side, look.side), Image.Resampling.LANCZOS)
        art = art.rotate(look.tilt, Image.Resampling.BICUBIC) if look.tilt else art
        picture = Image.new("RGB", (SIDE, SIDE), look.paper)
        picture.paste(art, (look.left, look.top), art)
        return picture


@cache
def _names(language: str) -> dict[str, str]:
    """Code point → name, of the emoji that are one character and no building block of others."""
    emoji.config.load_language(language)
    names = {}
    for characters, entry in sorted(emoji.EMOJI_DATA.items()):
        plain = characters.removesuffix("\ufe0f")
        whole = len(plain) == 1 and entry["status"] == emoji.STATUS["fully_qualified"] and language in entry
        if whole and unicodedata.category(plain) == "So":
            names[f"{ord(plain):x}"] = entry[language].strip(":").replace("_", " ")
    return names


def _split_of(code: str) -> str:
    return "test" if hashlib.sha256(code.encode()).digest()[0] % 10 == 0 else "train"
