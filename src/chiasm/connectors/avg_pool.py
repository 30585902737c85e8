"""Adaptive average pooling, which has no parameters, then an MLP (DeCo, arXiv 2405.20985)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.base import Grid
from chiasm.connectors.grids import PoolingConnector, as_map, as_patches, pooled_grid


class AveragePoolProjector(PoolingConnector):
    """A visual token is the mean of the patches below it, through Linear – GELU – Linear.

    Args:
        output_size: rows and columns of the visual tokens, or one number for both; half of the encoder's grid when it
            is None, as DeCo's 24 × 24 → 12 × 12.
    """

    def __init__(
        self, vision_width: int, language_width: int, grid: Grid, *, output_size: int | list | None = None
    ) -> None:
        super().__init__(vision_width, language_width, grid, pooled_grid("avg_pool", output_size, grid))
        self.up = nn.Linear(vision_width, language_width)
        self.out = nn.Linear(language_width, language_width)

    @property
    def output(self) -> nn.Linear:
        return self.out

    def flops(self) -> int:
        return 2 * self.num_tokens * (self.up.weight.numel() + self.out.weight.numel())

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        pooled = F.adaptive_avg_pool2d(as_map(features, self.grid), self.token_grid)
        return self.out(F.gelu(self.up(as_patches(pooled))))
