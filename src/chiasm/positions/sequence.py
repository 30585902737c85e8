"""Positions of a sequence that holds text, pictures and video frames: by one count, or by rows and columns too.

`raster` counts every token (Fuyu, Chameleon). `rope2d` gives a patch its row and column, `mrope` its frame, row and
column (M-RoPE, Qwen2-VL, arXiv 2409.12191); a picture starts behind the text before it, and the text after it behind
the largest of its coordinates. Words have the same number on every axis, so that text alone is counted as by `raster`.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Bool, Int
from torch import Tensor

AXES = {"raster": 1, "rope2d": 2, "mrope": 3}
"""Kind of positions → coordinates of a token."""

MODALITY = "+modality"
POSITIONS = tuple(f"{kind}{more}" for kind in AXES for more in ("", MODALITY))
"""What one word can choose: a kind, and whether embeddings tell words from patches on top of it."""

Grid = tuple[int, int, int]
"""Frames, rows and columns of a picture (one frame) or a video."""


def split_positions(word: str) -> tuple[str, bool]:
    """The kind of positions, and whether there are modality embeddings.

    Raises:
        ValueError: an unknown word; the message lists the known ones.
    """
    if word not in POSITIONS:
        raise ValueError(f"positions {word!r} is unknown; choose one of {', '.join(POSITIONS)}")
    return word.removesuffix(MODALITY), word.endswith(MODALITY)


def sequence_positions(
    kind: str,
    visual: Bool[Tensor, "B S"],
    grids: Sequence[Grid],
    attention_mask: Int[Tensor, "B S"] | None = None,
) -> Int[Tensor, "axes B S"]:
    """Coordinates of every token; padding has 0.

    Args:
        kind: a key of `AXES`.
        visual: which tokens belong to pictures.
        grids: of the pictures, in their order over the whole batch; `raster` does not read them.

    Raises:
        ValueError: the grids do not cover the visual tokens.
    """
    real = torch.ones_like(visual) if attention_mask is None else attention_mask.bool()
    if kind == "raster":
        return ((real.long().cumsum(dim=1) - 1).clamp(min=0) * real)[None]
    positions = torch.zeros(AXES[kind], *visual.shape, dtype=torch.long, device=visual.device)
    rest = list(reversed(grids))
    for row, (marks, kept) in enumerate(zip(visual, real, strict=True)):
        walked = _walk(marks[kept].tolist(), rest)
        positions[:, row, kept] = walked[-AXES[kind] :].to(visual.device)
    if rest:
        raise ValueError(f"{len(grids)} pictures have a grid, but only {len(grids) - len(rest)} stand in the text")
    return positions


def _walk(visual: list[bool], rest: list[Grid]) -> Int[Tensor, "3 S"]:
    """Frame, row and column of one row's tokens; its pictures are taken from the end of `rest`."""
    pieces, start = [torch.empty(3, 0, dtype=torch.long)], 0
    for is_picture, run in groupby(visual):
        length = len(list(run))
        if not is_picture:
            pieces.append(torch.arange(start, start + length).expand(3, -1))
            start += length
        while is_picture and length:
            if not rest or length < rest[-1][0] * rest[-1][1] * rest[-1][2]:
                grid = "no picture is left" if not rest else f"the next picture's grid is {rest[-1]}"
                raise ValueError(f"{length} visual tokens stand side by side, but {grid}")
            frames, rows, columns = rest.pop()
            pieces.append(grid_coordinates(frames, rows, columns) + start)
            start += max(rows, columns)
            length -= frames * rows * columns
    return torch.cat(pieces, dim=1)


def grid_coordinates(frames: int, rows: int, columns: int) -> Int[Tensor, "3 N"]:
    """Frame, row and column of every place of a grid, in raster order."""
    axes = (torch.arange(frames), torch.arange(rows), torch.arange(columns))
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
