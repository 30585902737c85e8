"""C-Abstractor: convolutions, adaptive average pooling, convolutions, and an MLP (Honeybee, arXiv 2312.06742)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.base import Grid
from chiasm.connectors.grids import PoolingConnector, as_map, as_patches, pooled_grid


class CAbstractor(PoolingConnector):
    """Visual tokens keep their places and know their neighbourhood.

    Args:
        output_size: rows and columns of the visual tokens, or one number for both; half of the encoder's grid when it
            is None. Honeybee has 12 for 144 tokens.
        depth: blocks before and after pooling, each.
        width: channels of the blocks.
        position_embeddings: whether patches have a learned position.
    """

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        grid: Grid,
        *,
        output_size: int | list | None = None,
        depth: int = 3,
        width: int = 1024,
        position_embeddings: bool = True,
    ) -> None:
        super().__init__(vision_width, language_width, grid, pooled_grid("c_abstractor", output_size, grid))
        shape = (grid[0] * grid[1], vision_width)
        self.positions = nn.Parameter(torch.randn(shape) * 0.02) if position_embeddings else None
        self.before: Any = nn.Sequential(
            RegBlock(vision_width, width), *(RegBlock(width, width) for _ in range(depth - 1))
        )
        self.after: Any = nn.Sequential(*(RegBlock(width, width) for _ in range(depth)))
        self.up = nn.Linear(width, language_width)
        self.out = nn.Linear(language_width, language_width)

    @property
    def output(self) -> nn.Linear:
        return self.out

    def flops(self) -> int:
        before = sum(block.flops(self.grid) for block in self.before)
        after = sum(block.flops(self.token_grid) for block in self.after)
        return before + after + 2 * self.num_tokens * (self.up.weight.numel() + self.out.weight.numel())

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        if self.positions is not None:
            features = features + self.positions
        cells = self.before(as_map(features, self.grid))
        cells = self.after(F.adaptive_avg_pool2d(cells, self.token_grid))
        return self.out(F.silu(self.up(as_patches(cells))))


class RegBlock(nn.Module):
    """RegNet's bottleneck (arXiv 2003.13678): pointwise, depth-wise 3 × 3, squeeze-and-excitation, pointwise, residual.

    Layer norms over the channels stand in place of batch norms, SiLU in place of ReLU.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, width, 1, bias=False)
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.expand = nn.Conv2d(width, width, 1, bias=False)
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(3))
        self.squeeze = nn.Linear(width, max(inputs // 4, 1))
        self.excite = nn.Linear(max(inputs // 4, 1), width)
        self.shortcut: Any = nn.Identity()
        if inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), ChannelNorm(width))

    def flops(self, grid: Grid) -> int:
        everywhere = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        once = self.squeeze.weight.numel() + self.excite.weight.numel()
        return 2 * (grid[0] * grid[1] * sum(layer.weight.numel() for layer in everywhere) + once)

    def forward(self, cells: Float[Tensor, "B C rows columns"]) -> Float[Tensor, "B width rows columns"]:
        inner = F.silu(self.norms[0](self.reduce(cells)))
        inner = F.silu(self.norms[1](self.spatial(inner)))
        gates = self.excite(F.silu(self.squeeze(inner.mean(dim=(2, 3))))).sigmoid()
        inner = self.norms[2](self.expand(inner * gates[:, :, None, None]))
        return F.silu(inner + self.shortcut(cells))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map, cell by cell."""

    def forward(self, cells: Float[Tensor, "B C rows columns"]) -> Float[Tensor, "B C rows columns"]:
        return super().forward(cells.movedim(1, -1)).movedim(-1, 1)
