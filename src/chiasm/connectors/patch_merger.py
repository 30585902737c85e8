"""Patch merger: LayerNorm, f × f patches side by side, then an MLP (Qwen2-VL, arXiv 2409.12191)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.base import Grid
from chiasm.connectors.grids import BlockConnector, block_grid, blocks


class PatchMerger(BlockConnector):
    """T = N / f², rounded up in each direction: an odd grid is filled up with zeros behind the norm.

    Args:
        factor: side f of a block, 2 in Qwen2-VL.
    """

    def __init__(self, vision_width: int, language_width: int, grid: Grid, *, factor: int = 2) -> None:
        super().__init__(vision_width, language_width, grid, block_grid("patch_merger", factor, grid))
        self.factor = factor
        width = vision_width * factor**2
        self.norm = nn.LayerNorm(vision_width, eps=1e-6)
        self.merge = nn.Linear(width, width)
        self.out = nn.Linear(width, language_width)

    @property
    def output(self) -> nn.Linear:
        return self.out

    def flops(self) -> int:
        return 2 * self.num_tokens * (self.merge.weight.numel() + self.out.weight.numel())

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        merged = blocks(self.norm(features), self.grid, self.factor).flatten(2)
        return self.out(F.gelu(self.merge(merged)))
