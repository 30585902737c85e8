"""Emoji names: every emoji of the Twemoji artwork with its name in one of many languages (Unicode CLDR).

What retrieval and zero-shot classification are measured by. `train` and `test` share no emoji.
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
from chiasm.data.schema import ImageRef, Sample, Samples
from chiasm.data.splits import Subset

SPLITS = ("all", "train", "test")
SIDE, DRAWN = 224, 176
PAPER = (236, 236, 232)
QUESTION = {"en": "What is this?", "ko": "이것은 무엇입니까?"}


class EmojiNames(Samples):
    """A picture and a name for each emoji.

    Args:
        split: "all", "test" (a tenth, by a hash of the code point) or "train" (the others).
        language: of the names, a language of the package `emoji`, such as "en" or "ko".
        size: at most so many, evenly spread.
        artwork: folder of the 72x72 PNGs; None is the alias `twemoji`, fetched once.
    """

    OPTIONS = ("language", "size", "artwork")

    def __init__(
        self, split: str = "all", language: str = "en", size: int | None = None, artwork: str | Path | None = None
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        if language not in emoji.LANGUAGES:
            raise ValueError(f"language is {language!r}, expected one of {', '.join(emoji.LANGUAGES)}")
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"size is {size!r}, expected a whole number above 0")
        folder = Path(sources.resolve("twemoji") if artwork is None else artwork)
        self.artwork = folder / "72x72" if (folder / "72x72").is_dir() else folder
        self.split, self.language = split, language
        known = {path.stem for path in self.artwork.glob("*.png")}
        codes = [code for code in _names(language) if code in known and split in ("all", _split_of(code))]
        self.codes = codes if size is None else [codes[i * len(codes) // size] for i in range(min(size, len(codes)))]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        code = self.codes[index]
        question = QUESTION.get(self.language, QUESTION["en"])
        messages: list[dict] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": _names(self.language)[code]},
        ]
        picture = ImageRef.of(OnPaper(self.artwork / f"{code}.png"), f"of emoji {code}")
        return Sample(f"{code}-{self.language}", messages, [picture], "naming", {"emoji": code, "split": self.split})


@dataclass(frozen=True)
class OnPaper:
    """One emoji in the middle of a light square: draws the picture when called, and can be sent to another process."""

    file: Path

    def __call__(self) -> Image.Image:
        with Image.open(self.file) as source:
            art = source.convert("RGBA").resize((DRAWN, DRAWN), Image.Resampling.LANCZOS)
        picture, edge = Image.new("RGB", (SIDE, SIDE), PAPER), (SIDE - DRAWN) // 2
        picture.paste(art, (edge, edge), art)
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
