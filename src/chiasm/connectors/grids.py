"""Patches as a picture: pooling to a coarser grid, and blocks of f × f patches (space-to-depth, arXiv 1609.05158)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from chiasm.connectors.base import Grid, GridConnector


class PoolingConnector(GridConnector):
    """A connector whose option `output_size` is the grid of its tokens."""

    @classmethod
    def options_for(cls, tokens: int, grid: Grid) -> dict[str, Any]:
        side = math.isqrt(tokens)
        if side**2 != tokens or side > min(grid):
            most = min(grid)
            raise ValueError(f"pools to a square grid of at most {most}×{most}, and {tokens} tokens are none")
        return {"output_size": side}


class BlockConnector(GridConnector):
    """A connector whose option `factor` is the side of the blocks of patches that become a token each."""

    factor: int

    @classmethod
    def options_for(cls, tokens: int, grid: Grid) -> dict[str, Any]:
        factors = range(max(grid), 0, -1)
        made = {math.prod(-(-side // factor) for side in grid): factor for factor in factors}
        if tokens not in made:
            possible = ", ".join(map(str, sorted(made, reverse=True)))
            raise ValueError(f"folds a grid of {grid[0]}×{grid[1]} into {possible} tokens, not {tokens}")
        return {"factor": made[tokens]}

    def attention(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T N"]:
        """Every visual token takes the patches of its block in equal shares."""
        members = block_members(self.grid, self.factor, features).sum(dim=1)
        return (members / members.sum(dim=1, keepdim=True)).expand(features.shape[0], -1, -1)


def as_map(patches: Float[Tensor, "B N C"], grid: Grid) -> Float[Tensor, "B C rows columns"]:
    """Patches in row order as a feature map."""
    return patches.transpose(1, 2).unflatten(2, grid)


def as_patches(feature_map: Float[Tensor, "B C rows columns"]) -> Float[Tensor, "B N C"]:
    """A feature map as patches, row by row."""
    return feature_map.flatten(2).transpose(1, 2)


def pooled_grid(connector: str, output_size: int | list | None, grid: Grid) -> Grid:
    """The grid that pooling ends on: `output_size`, or half of the encoder's where it is None.

    Raises:
        ValueError: it is finer than the encoder's, or no grid.
    """
    if output_size is None:
        return -(-grid[0] // 2), -(-grid[1] // 2)
    sizes = [output_size, output_size] if isinstance(output_size, int) else list(output_size)
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"connector {connector} has output_size {output_size}, expected one number or [rows, columns]")
    rows, columns = sizes
    if not (1 <= rows <= grid[0] and 1 <= columns <= grid[1]):
        raise ValueError(
            f"connector {connector} has output_size {rows}×{columns}, expected at least 1×1 and at most the encoder's "
            f"grid {grid[0]}×{grid[1]}"
        )
    return rows, columns


def block_grid(connector: str, factor: int, grid: Grid) -> Grid:
    """The grid of f × f blocks; a block at the edge of an odd grid is filled up with zeros.

    Raises:
        ValueError: a block is larger than the grid.
    """
    if not 1 <= factor <= max(grid):
        raise ValueError(
            f"connector {connector} has factor {factor}, expected 1 to {max(grid)} for the encoder's grid "
            f"{grid[0]}×{grid[1]}"
        )
    return -(-grid[0] // factor), -(-grid[1] // factor)


def blocks(patches: Float[Tensor, "B N C"], grid: Grid, factor: int) -> Float[Tensor, "B T cells C"]:
    """The patches of every f × f block, both in row order; places beyond the grid are zero."""
    rows, columns = -(-grid[0] // factor), -(-grid[1] // factor)
    cells = patches.unflatten(1, grid)
    spare = (0, 0, 0, columns * factor - grid[1], 0, rows * factor - grid[0])
    if any(spare):
        cells = F.pad(cells, spare)
    cells = cells.unflatten(2, (columns, factor)).unflatten(1, (rows, factor))
    return cells.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def block_members(grid: Grid, factor: int, like: Tensor) -> Float[Tensor, "T cells N"]:
    """Which patch stands in which place of which block, as ones and zeros."""
    return blocks(torch.eye(grid[0] * grid[1], device=like.device, dtype=like.dtype)[None], grid, factor)[0]
