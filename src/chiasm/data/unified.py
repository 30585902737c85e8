"""Conversations and pictures → inputs of the unified transformer: pictures of any shape in the text, and in answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chiasm.data.chat import Message
from chiasm.data.pixels import tells_grids
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import ImageRef

ROW_TOKEN, BEGIN_TOKEN, END_TOKEN = "<row>", "<image_begin>", "<image_end>"
MARKERS = (ROW_TOKEN, BEGIN_TOKEN, END_TOKEN)


@dataclass(frozen=True)
class GridPlaceholders:
    """How a picture is written: row by row, each with its end (Fuyu), or in one run, between two marks.

    Args:
        token: of one patch or code.
        grid: frames, rows and columns where a picture does not bring its own.
        row: ends a row; None where rows have no end.
        frame: none, or the two tokens that open and close a picture.
        merge: patches of a token's side, where the grid counts patches (Qwen2-VL).
    """

    token: int
    grid: tuple[int, int, int]
    row: int | None = None
    frame: tuple[int, ...] = ()
    merge: int = 1

    def of(self, grid: Any, follows_picture: bool) -> list[int]:
        """Tokens of a picture with this grid."""
        frames, rows, columns = grid if isinstance(grid, list | tuple) else self.grid
        line = [self.token] * (columns // self.merge) + ([] if self.row is None else [self.row])
        return [*self.frame[:1], *line * (rows // self.merge) * frames, *self.frame[1:]]


class UnifiedProcessor(ChiasmProcessor):
    """A processor whose pictures have rows and columns, and may be answers.

    Args:
        grid: rows and columns of every picture; None where each has its own, told by the image processor.
        row_token: ends a row of patches; None for codes, whose grid is always the same.
        merge: patches of a placeholder's side.
    """

    own_options = ("num_image_tokens", "grid", "row_token", "merge")
    draws = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        grid: Sequence[int] | None = None,
        row_token: str | None = None,
        merge: int = 1,
        **options: Any,
    ) -> None:
        self.grid = None if grid is None else list(grid)
        self.row_token, self.merge = row_token, merge
        super().__init__(image_processor, tokenizer, num_image_tokens, **options)

    @property
    def placeholders(self) -> Any:
        frame = tuple(self.tokenizer.convert_tokens_to_ids(token) for token in self.image_boundary or ())
        row = None if self.row_token is None else self.tokenizer.convert_tokens_to_ids(self.row_token)
        rows, columns = self.grid or (1, 1)
        return GridPlaceholders(self.image_token_id, (1, rows, columns), row, frame, self.merge)

    def tiles_of(self, images: Sequence[ImageRef]) -> list[Any] | None:
        """Every picture's grid, for which it is opened; None where all have one."""
        if self.grid is not None:
            return None
        if not images:
            return []
        made = self.image_processor([image.load() for image in images], return_tensors="pt")
        return [tuple(grid) for grid in torch.as_tensor(made["image_grid_thw"]).tolist()]

    def encode(self, messages: list[Message], *args: Any, tiles: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """Also the pictures' grids, where they have their own."""
        encoded: dict[str, Any] = super().encode(messages, *args, **kwargs | {"tiles": tiles})
        return encoded | ({"grids": list(tiles)} if tiles and self.grid is None else {})

    def shapes_of(self, encoded: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`image_grid_thw`, of all pictures in their order."""
        grids = [grid for item in encoded for grid in item.get("grids", ())]
        return {"image_grid_thw": torch.tensor(grids)} if grids else {}

    @property
    def model_input_names(self) -> list[str]:
        more = ["image_grid_thw"] if tells_grids(self.image_processor) else []
        return [*super().model_input_names, *more]
