"""Pixel shuffle: the channels of f × f patches, side by side, are one visual token (InternVL, arXiv 2404.16821).

Idefics3 (arXiv 2408.12637) and nanoVLM project the block with one matrix, InternVL with LayerNorm – Linear – GELU –
Linear.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.base import Grid
from chiasm.connectors.grids import BlockConnector, block_grid, blocks

PROJECTIONS = ("mlp", "linear")


class PixelShuffleProjector(BlockConnector):
    """T = N / f², rounded up in each direction: an odd grid is filled up with zeros.

    Args:
        factor: side f of a block; 2 in InternVL and Idefics3, 4 in nanoVLM.
        projection: `mlp` as in InternVL, or `linear` without a bias as in Idefics3 and nanoVLM.
    """

    def __init__(
        self, vision_width: int, language_width: int, grid: Grid, *, factor: int = 2, projection: str = "mlp"
    ) -> None:
        super().__init__(vision_width, language_width, grid, block_grid("pixel_shuffle", factor, grid))
        if projection not in PROJECTIONS:
            raise ValueError(f"projection {projection!r} is unknown; choose one of {', '.join(PROJECTIONS)}")
        self.factor = factor
        width = vision_width * factor**2
        self.layers: Any = nn.Sequential(nn.Linear(width, language_width, bias=False))
        if projection == "mlp":
            first, last = nn.Linear(width, language_width), nn.Linear(language_width, language_width)
            self.layers = nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)

    @property
    def output(self) -> nn.Linear:
        return self.layers[-1]

    def flops(self) -> int:
        linear = (layer for layer in self.layers if isinstance(layer, nn.Linear))
        return 2 * self.num_tokens * sum(layer.weight.numel() for layer in linear)

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        return self.layers(blocks(features, self.grid, self.factor).flatten(2))
