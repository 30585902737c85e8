"""How a picture is written in tokens: its placeholders, what frames them, and the names of its regions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

DOWN = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
ACROSS = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}


@dataclass(frozen=True)
class Placeholders:
    """How a picture is written in tokens.

    Args:
        token: of one visual token.
        count: T, visual tokens of a tile.
        frame: none; or one token, before and after every tile, which pictures side by side share; or two, which open
            and close a picture.
        regions: for each region of a tile, the words that stand in front of its share of the visual tokens.
        end: what stands behind a tile that has regions.
    """

    token: int
    count: int
    frame: tuple[int, ...] = ()
    regions: tuple[tuple[int, ...], ...] = ()
    end: tuple[int, ...] = ()

    def of(self, tiles: int, follows_picture: bool) -> list[int]:
        """Tokens of a picture that was cut into so many tiles."""
        parts = self.regions or ((),)
        tile = [token for words in parts for token in [*words, *[self.token] * (self.count // len(parts))]]
        tile += self.end
        if len(self.frame) == 1:
            return [*self.frame] * (not follows_picture) + [*tile, *self.frame] * tiles
        return [*self.frame[:1], *tile * tiles, *self.frame[1:]]


@dataclass(frozen=True)
class TiledPlaceholders:
    """How a picture is written in tiles, row by row, each behind its place, and as a whole at last (Idefics3).

    Args:
        token: of one visual token.
        count: T, visual tokens of a tile.
        frame: the token in front of every tile and of the whole, and behind it.
        whole: what stands in front of the whole.
        place: what stands in front of a tile, by its row and column.
        ends: what ends a row, and what ends the last.
    """

    token: int
    count: int
    frame: int
    whole: tuple[int, ...]
    place: Callable[[int, int], list[int]]
    ends: tuple[tuple[int, ...], tuple[int, ...]]

    def of(self, tiles: Any, follows_picture: bool) -> list[int]:
        """Tokens of a picture that was cut into so many rows and columns, or that was not."""
        rows, columns = tiles if isinstance(tiles, tuple) else (0, 0)
        visual, written = [self.token] * self.count, []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                written += [self.frame, *self.place(row, column), *visual]
            written += self.ends[row == rows]
        return [*written, self.frame, *self.whole, *visual, self.frame]


def framed_placeholders(
    words: Any, token: int, count: int, boundary: str | Sequence[str] | None, regions: Sequence[int] | None
) -> Placeholders:
    """By a tokenizer, between the tokens of `boundary`, with the names of `regions`, rows and columns."""
    frame = [boundary] if isinstance(boundary, str) else boundary or []
    ids = tuple(words.convert_tokens_to_ids(mark) for mark in frame)
    if regions is None:
        return Placeholders(token, count, ids)
    texts = [*(f" {name}" for name in region_words(*regions)), "\n"]
    *named, end = (tuple(words(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return Placeholders(token, count, ids, tuple(named), end)


def tiled_placeholders(words: Any, token: int, count: int, frame: str, whole: str) -> TiledPlaceholders:
    """Idefics3's, by a tokenizer: `whole` stands in front of the whole picture, `<row_1_col_1>` of the first tile."""

    def ids(text: str) -> list[int]:
        return words(text, add_special_tokens=False)["input_ids"]

    def place(row: int, column: int) -> list[int]:
        return ids(f"<row_{row}_col_{column}>")

    ends = (tuple(ids("\n")), tuple(ids("\n\n")))
    return TiledPlaceholders(token, count, words.convert_tokens_to_ids(frame), tuple(ids(whole)), place, ends)


def region_words(down: int, across: int) -> list[str]:
    """The words for the regions of a picture, row by row.

    Raises:
        ValueError: there are no words for so many.
    """
    if down not in DOWN or across not in ACROSS or down * across == 1:
        raise ValueError(f"regions {down}×{across}, expected 1 to 3 rows and 1 to 3 columns, and more than one region")
    names = [f"{row} {column}".strip() for row in DOWN[down] for column in ACROSS[across]]
    return ["middle" if name == "middle middle" else name for name in names]
