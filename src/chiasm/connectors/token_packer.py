"""TokenPacker: coarse tokens fill up from the region of fine patches that they stand for (arXiv 2407.02392)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.attention import attend, split_heads
from chiasm.connectors.base import Grid
from chiasm.connectors.grids import BlockConnector, as_map, as_patches, block_grid, block_members, blocks


class TokenPacker(BlockConnector):
    """A query interpolated from the coarse picture attends to the f × f patches below it: T = N / f², rounded up.

    Args:
        factor: side f of a region, 2 to 4 in the paper.
        levels: feature maps of equal width that the channels hold; all of them are keys and values, the last one alone
            makes the queries. The paper has 4: `features={"layers": [12, 16, 22, 23]}`.
        heads: attention heads.
        head_dim: channels of one head.
    """

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        grid: Grid,
        *,
        factor: int = 2,
        levels: int = 1,
        heads: int = 8,
        head_dim: int = 128,
    ) -> None:
        super().__init__(vision_width, language_width, grid, block_grid("token_packer", factor, grid))
        if vision_width % levels:
            raise ValueError(
                f"connector token_packer has levels={levels}, which does not divide the {vision_width} feature "
                "channels; read as many layers of equal width, without appended positions"
            )
        self.factor, self.levels, self.heads = factor, levels, heads
        width = heads * head_dim
        self.query: Any = nn.Sequential(
            nn.Linear(vision_width // levels, width, bias=False), nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width)
        )
        self.key: Any = self._branch(vision_width, width, bias=False)
        self.value: Any = self._branch(vision_width, width, bias=True)
        self.attention_out = nn.Linear(width, width)
        self.up = nn.Linear(width, language_width)
        self.out = nn.Linear(language_width, language_width)

    @staticmethod
    def _branch(vision_width: int, width: int, bias: bool) -> nn.Sequential:
        """Keys need no bias behind their last nonlinearity: a softmax does not see it."""
        return nn.Sequential(
            nn.Linear(vision_width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.LayerNorm(width, eps=1e-6, bias=bias),
            nn.Linear(width, width, bias=bias),
        )

    @property
    def output(self) -> nn.Linear:
        return self.out

    def flops(self) -> int:
        patches, cells = self.grid[0] * self.grid[1], self.factor**2
        fine = _elements(self.key) + _elements(self.value)
        coarse = sum(map(_elements, (self.query, self.attention_out, self.up, self.out)))
        attention = 2 * cells * self.up.in_features
        return 2 * (patches * fine + self.num_tokens * (coarse + attention))

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        packed, _ = self._pack(features)
        return self.out(F.gelu(self.up(self.attention_out(packed))))

    def attention(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T N"]:
        _, weights = self._pack(features)
        members = block_members(self.grid, self.factor, features)
        return torch.einsum("btc,tcn->btn", weights.mean(dim=2).squeeze(2).to(members), members)

    def _pack(self, features: Tensor) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T H 1 cells"]]:
        last = as_map(features[..., -(features.shape[-1] // self.levels) :], self.grid)
        coarse = F.interpolate(last.float(), size=self.token_grid, mode="bilinear").to(features.dtype)
        query = split_heads(self.query(as_patches(coarse)).unsqueeze(2), self.heads)
        key, value = (
            split_heads(blocks(branch(features), self.grid, self.factor), self.heads)
            for branch in (self.key, self.value)
        )
        inside = blocks(torch.ones_like(features[:1, :, :1]), self.grid, self.factor).bool()
        packed, weights = attend(query, key, value, inside[:, :, None].transpose(3, 4))
        return packed.flatten(2), weights


def _elements(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
