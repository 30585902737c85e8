"""Where pictures stand in a text: the tokens of a picture, what frames them, and which pictures are whose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chiasm.data.chat import IMAGE_TOKEN, Message, count_images

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


def check_count(placeholders: int, images: int) -> None:
    """Refuses too many or too few pictures."""
    if placeholders != images:
        raise ValueError(
            f"{placeholders} image placeholder(s) in the messages but {images} image(s) given; "
            f"write one {IMAGE_TOKEN} (or one image part) for each image"
        )


def flatten_images(images: Any) -> tuple[list[Any], list[int] | None]:
    """A flat list of pictures, and their number for each conversation where the nesting tells it."""
    if images is None:
        return [], None
    if not isinstance(images, list | tuple):
        return [images], None
    if images and all(isinstance(item, list | tuple) or item is None for item in images):
        groups = [list(item or []) for item in images]
        return [image for group in groups for image in group], [len(group) for group in groups]
    return list(images), None


def as_messages(texts: list[str], counts: list[int]) -> list[list[Message]]:
    """One user's message for each text; where no text has placeholders, as many as it has pictures come first."""
    if len(counts) == len(texts) and not any(IMAGE_TOKEN in text for text in texts):
        texts = [IMAGE_TOKEN * count + text for count, text in zip(counts, texts, strict=True)]
    return [[{"role": "user", "content": text}] for text in texts]


def deal_images(batch: list[list[Message]], total: int) -> list[int]:
    """Flat pictures dealt to conversations by their placeholders."""
    counts = [count_images(messages) for messages in batch]
    check_count(sum(counts), total)
    return counts


def deal_tiles(tiles: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """Each picture's number of tiles, by conversation."""
    rest = iter(tiles)
    return [[next(rest) for _ in range(count)] for count in counts]
