"""LDPv2, the lightweight downsample projector of MobileVLM V2 (arXiv 2402.03766).

Two pointwise convolutions, average pooling, and a depth-wise convolution with a residual that tells a token where it
stands (PEG, arXiv 2102.10882).
"""

from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.base import Grid
from chiasm.connectors.grids import PoolingConnector, as_map, as_patches, pooled_grid


class LightweightDownsampleProjector(PoolingConnector):
    """A visual token is the mean of 2 × 2 projected patches, plus what its neighbours tell it.

    Args:
        output_size: rows and columns of the visual tokens, or one number for both; half of the encoder's grid when it
            is None, as MobileVLM's 24 × 24 → 12 × 12.
    """

    def __init__(
        self, vision_width: int, language_width: int, grid: Grid, *, output_size: int | list | None = None
    ) -> None:
        super().__init__(vision_width, language_width, grid, pooled_grid("ldp", output_size, grid))
        self.up = nn.Linear(vision_width, language_width)
        self.out = nn.Linear(language_width, language_width)
        self.peg = nn.Conv2d(language_width, language_width, 3, padding=1, groups=language_width)
        nn.init.zeros_(cast(Tensor, self.peg.bias))

    @property
    def output(self) -> nn.Linear:
        return self.out

    def flops(self) -> int:
        patches = self.grid[0] * self.grid[1]
        pointwise = self.up.weight.numel() + self.out.weight.numel()
        return 2 * (patches * pointwise + self.num_tokens * self.peg.weight.numel())

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        projected = self.out(F.gelu(self.up(features)))
        pooled = F.adaptive_avg_pool2d(as_map(projected, self.grid), self.token_grid)
        return as_patches(self.peg(pooled) + pooled)
