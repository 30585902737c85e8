"""Which feature maps are read from a vision encoder, and how they become one grid of patch features.

Maps of different strides meet on the coarsest grid: `fold` moves every f × f block of cells into the channels and
loses nothing (space-to-depth, the pixel unshuffle of arXiv 1609.05158); `pool` averages the block.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]

REDUCTIONS = ("fold", "pool")
PREFIXES = ("drop", "keep")
RESOLUTIONS = ("fixed", "native")


@dataclass(frozen=True)
class FeatureLayer:
    """One map of the encoder.

    Args:
        layer: `"last"` (last_hidden_state), an index into hidden_states, or a name in the output's feature_maps.
        grid: cells of the map, (rows, columns).
        prefix_tokens: class and register tokens in front of the patches; 0 for a map `(B, C, rows, columns)`.
        reduce: how it reaches a coarser grid, `fold` or `pool`.
    """

    layer: int | str
    grid: Grid
    prefix_tokens: int = 0
    reduce: str = "fold"

    def __post_init__(self) -> None:
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce {self.reduce!r} is unknown; choose one of {', '.join(REDUCTIONS)}")

    def channels(self, width: int, grid: Grid) -> int:
        """Channels per cell of `grid` when the map itself has `width`."""
        return width * self.fold_factor(grid) ** 2 if self.reduce == "fold" else width

    def fold_factor(self, grid: Grid) -> int:
        """Side f of the blocks that turn this map's grid into `grid`; an edge block may be filled up with zeros.

        Raises:
            ValueError: no whole f does.
        """
        factor = -(-self.grid[0] // grid[0])
        if (-(-self.grid[0] // factor), -(-self.grid[1] // factor)) != grid:
            raise ValueError(
                f"layer {self.layer!r} has a grid of {self.grid[0]}×{self.grid[1]}, which does not fold to "
                f"{grid[0]}×{grid[1]}; use reduce='pool' or another grid"
            )
        return factor

    def patches(self, hidden: Float[Tensor, "B ..."], grid: Grid, keep_prefix: bool = False) -> Float[Tensor, "B N D"]:
        """The map as patches of `grid`, row by row; its prefix tokens are left out or come first."""
        start = 0 if keep_prefix else self.prefix_tokens
        tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, start:]
        if self.grid == grid:
            return tokens
        cells = tokens.unflatten(1, self.grid)
        if self.reduce == "pool":
            return F.adaptive_avg_pool2d(cells.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
        return _fold(cells, grid, self.fold_factor(grid))


@dataclass(frozen=True)
class VisionFeatures:
    """Everything that has to be known about an encoder's output before it runs; stored with a checkpoint.

    Args:
        layers: the maps that are read, concatenated along the channels in this order.
        grid: patches of the result, (rows, columns).
        width: D_v, channels of one patch of the result.
        image_size: pictures that the encoder takes, (height, width) in pixels.
        interpolate_positions: whether the encoder is asked to stretch its learned positions to this image size.
        prefix: `drop` leaves class and register tokens out; `keep` puts them in front of the patches as part of N.
        resolution: `fixed` takes pictures of `image_size`; `native` those of any size, side by side with a mask, whose
            patches are then not the `grid` (NaViT, arXiv 2307.06304).
    """

    layers: tuple[FeatureLayer, ...]
    grid: Grid
    width: int
    image_size: Grid
    interpolate_positions: bool = False
    prefix: str = "drop"
    resolution: str = "fixed"

    def __post_init__(self) -> None:
        if self.prefix not in PREFIXES:
            raise ValueError(f"prefix {self.prefix!r} is unknown; choose one of {', '.join(PREFIXES)}")
        if self.resolution not in RESOLUTIONS:
            raise ValueError(f"resolution {self.resolution!r} is unknown; choose one of {', '.join(RESOLUTIONS)}")
        if self.resolution == "native" and any(layer.grid != self.grid for layer in self.layers):
            raise ValueError(
                f"resolution 'native' reads layers on their own grid, got the grid {self.grid}; leave it out"
            )
        shapes = {(layer.grid, layer.prefix_tokens) for layer in self.layers}
        kept = self.prefix == "keep" and any(layer.prefix_tokens for layer in self.layers)
        if kept and (len(shapes) > 1 or self.layers[0].grid != self.grid):
            raise ValueError(
                f"prefix 'keep' needs layers of one size on their own grid, got {sorted(shapes)} (grid, prefix tokens) "
                f"for the grid {self.grid}; read layers of one size, or take prefix: drop"
            )

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches: 0 unless they are kept."""
        return self.layers[0].prefix_tokens if self.prefix == "keep" else 0

    def combine(self, hidden: list[Tensor]) -> Float[Tensor, "B N D_v"]:
        """Patch features of the encoder's maps, given in the order of `layers`."""
        keep = self.prefix == "keep"
        patches = [layer.patches(states, self.grid, keep) for layer, states in zip(self.layers, hidden, strict=True)]
        return patches[0] if len(patches) == 1 else torch.cat(patches, dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts for JSON."""
        plain = asdict(self)
        plain["layers"] = [layer | {"grid": list(layer["grid"])} for layer in plain["layers"]]
        return plain | {"grid": list(self.grid), "image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "VisionFeatures":
        """Back from `to_dict`.

        Raises:
            ValueError: a key is unknown or missing.
        """
        _check_keys("features", cls, plain)
        layers = []
        for layer in plain["layers"]:
            _check_keys("features.layers", FeatureLayer, layer)
            layers.append(FeatureLayer(**layer | {"grid": tuple(layer["grid"])}))
        sizes = {"grid": tuple(plain["grid"]), "image_size": tuple(plain["image_size"])}
        return cls(**plain | {"layers": tuple(layers)} | sizes)


def _check_keys(where: str, kind: type, plain: dict[str, Any]) -> None:
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(set(plain) - set(known)):
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
    optional = {"prefix_tokens", "reduce", "interpolate_positions", "prefix", "resolution"}
    if missing := [name for name in known if name not in plain and name not in optional]:
        raise ValueError(f"{where} lacks the key {missing[0]!r}; it was written by VisionFeatures.to_dict?")


def _fold(cells: Float[Tensor, "B rows columns C"], grid: Grid, factor: int) -> Float[Tensor, "B N D"]:
    rows, columns = grid
    spare = (0, 0, 0, columns * factor - cells.shape[2], 0, rows * factor - cells.shape[1])
    blocks = F.pad(cells, spare) if any(spare) else cells
    blocks = blocks.unflatten(2, (columns, factor)).unflatten(1, (rows, factor))
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def layer_grid(tokens: int, image_size: Grid, patch_size: Grid | None, map_grids: list[Grid]) -> tuple[Grid, int]:
    """Grid of a token sequence and the number of prefix tokens in front of it.

    Args:
        tokens: length of the sequence, prefix included.
        image_size: the picture in pixels.
        patch_size: pixels of a patch in the encoder's configuration, if it has one.
        map_grids: grids of the `(B, C, rows, columns)` maps that the encoder returns beside it.

    Raises:
        ValueError: no grid, or more than one, fits.
    """
    if patch_size is not None:
        finest = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
        if tokens >= finest[0] * finest[1]:
            return finest, tokens - finest[0] * finest[1]
    if map_grids:
        rows, columns = min(map_grids)
        if tokens >= rows * columns:
            return (rows, columns), tokens - rows * columns
    strides = (1 << power for power in range(1, 8))
    candidates = {(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in strides}
    fitting = {(grid, prefix) for grid in candidates for prefix in (0, 1) if grid[0] * grid[1] + prefix == tokens}
    if len(fitting) != 1:
        raise ValueError(
            f"{tokens} tokens of a {image_size[0]}×{image_size[1]} picture fit no single grid of patches; "
            "pass an image_size= that is a multiple of the encoder's stride, or read a layer that is a map"
        )
    return fitting.pop()
