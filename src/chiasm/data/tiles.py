"""Pictures in tiles (LLaVA-NeXT, 2024): the grid of tiles that suits a picture's shape, padded, behind the whole.

Of the tiles' visual tokens, those that only padding made are left out, and a token of its own ends every row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.image_processing_utils import select_best_resolution

from chiasm.data.chat import Message
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import ImageRef

Grid = tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut, and how many visual tokens they have.

    Args:
        grids: rows and columns of tiles to choose from.
        size: height and width of a tile in pixels.
        tokens: rows and columns of a tile's visual tokens.
    """

    grids: tuple[Grid, ...]
    size: Grid
    tokens: Grid

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of tiles of a picture: most of its pixels kept, and least room wasted."""
        sizes = [(rows * self.size[0], columns * self.size[1]) for rows, columns in self.grids]
        best = select_best_resolution((height, width), sizes)
        return best[0] // self.size[0], best[1] // self.size[1]

    def tiles(self, height: int, width: int) -> int:
        """Tiles of a picture, the whole among them."""
        rows, columns = self.grid(height, width)
        return 1 + rows * columns

    def kept(self, height: int, width: int) -> tuple[range, range]:
        """Rows and columns of the tiles' visual tokens that show the picture and not what pads it."""
        down, across = self.grid(height, width)
        rows, columns = down * self.tokens[0], across * self.tokens[1]
        if width / height > columns / rows:
            margin = (rows - int(round(height * (columns / width), 7))) // 2
            return range(margin, rows - margin), range(columns)
        margin = (columns - int(round(width * (rows / height), 7))) // 2
        return range(rows), range(margin, columns - margin)

    def length(self, height: int, width: int) -> int:
        """Visual tokens of a picture: those of the whole, and each row of the tiles with its end."""
        rows, columns = self.kept(height, width)
        return self.tokens[0] * self.tokens[1] + len(rows) * (len(columns) + 1)

    @property
    def square(self) -> Grid:
        """Height and width of a picture that costs are told for: a square that fills the longest side."""
        rows, columns = (max(sides) for sides in zip(*self.grids, strict=True))
        side = max(rows * self.size[0], columns * self.size[1])
        return side, side


@dataclass(frozen=True)
class SizedPlaceholders:
    """How a picture in tiles is written: as many tokens as its size gives."""

    token: int
    tiling: Tiling

    def of(self, size: Any, follows_picture: bool) -> list[int]:
        """Tokens of a picture of this height and width; of a square one where they are not known."""
        return [self.token] * self.tiling.length(*(size if isinstance(size, tuple) else self.tiling.square))


class TiledProcessor(ChiasmProcessor):
    """A processor whose image processor is LLaVA-NeXT's.

    Args:
        num_image_tokens: placeholders of a large square picture.
        token_grid: rows and columns of a tile's visual tokens.
    """

    own_options = ("num_image_tokens", "token_grid")

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        token_grid: Sequence[int] = (1, 1),
        **options: Any,
    ) -> None:
        self.token_grid = list(token_grid)
        super().__init__(image_processor, tokenizer, num_image_tokens, **options)

    @property
    def tiling(self) -> Tiling:
        """The image processor's grids, whose pinpoints are sizes in pixels."""
        crop, size = self.image_processor.crop_size or {}, self.image_processor.size
        side = crop.get("height") or size.get("height") or size["shortest_edge"]
        grids = tuple((height // side, width // side) for height, width in self.image_processor.image_grid_pinpoints)
        return Tiling(grids, (side, side), (self.token_grid[0], self.token_grid[1]))

    @property
    def tiles(self) -> list[list[int]]:
        """Rows and columns of the grids, as the model's configuration has them."""
        return [list(grid) for grid in self.tiling.grids]

    @property
    def placeholders(self) -> Any:
        return SizedPlaceholders(self.image_token_id, self.tiling)

    def tiles_of(self, images: Sequence[ImageRef]) -> list[Any]:
        """Every picture's height and width, for which it is opened."""
        return [(picture.height, picture.width) for picture in (image.load() for image in images)]

    def encode(self, messages: list[Message], *args: Any, tiles: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """Also the pictures' sizes."""
        encoded: dict[str, Any] = super().encode(messages, *args, **kwargs | {"tiles": tiles})
        return encoded | ({"image_sizes": list(tiles)} if tiles else {})

    def shapes_of(self, encoded: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`image_sizes`, height and width of all pictures in their order."""
        sizes = [size for item in encoded for size in item.get("image_sizes", ())]
        return {"image_sizes": torch.tensor(sizes)} if sizes else {}

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_sizes"]
