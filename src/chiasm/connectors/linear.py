"""Linear projector: one matrix from the encoder's space to the language model's (LLaVA, arXiv 2304.08485)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.base import AffineConnector, Grid


class LinearProjector(AffineConnector):
    """Every patch becomes one visual token: T = N.

    Args:
        bias: whether the matrix comes with an offset.
        project: without it the patches themselves are the visual tokens, which only cross-attention reads.
    """

    takes_prefix = True

    def __init__(
        self, vision_width: int, language_width: int, grid: Grid, *, bias: bool = True, project: bool = True
    ) -> None:
        super().__init__(vision_width, language_width, grid)
        self.proj = nn.Linear(vision_width, language_width, bias=bias) if project else None

    @property
    def num_tokens(self) -> int:
        return self.num_features

    @property
    def width(self) -> int:
        return self.vision_width if self.proj is None else self.language_width

    @property
    def token_grid(self) -> Grid:
        return self.grid

    @property
    def output(self) -> nn.Linear | None:
        return self.proj

    def flops(self) -> int:
        return 0 if self.proj is None else 2 * self.num_tokens * self.proj.weight.numel()

    @property
    def can_be_affine(self) -> bool:
        return self.proj is not None and self.proj.bias is not None

    @torch.no_grad()
    def set_affine(self, weight: Float[Tensor, "D_l D_v"], bias: Float[Tensor, " D_l"], spread: float) -> None:
        if self.proj is None or self.proj.bias is None:
            raise ValueError("connector linear without a matrix or a bias is no affine map; remove project or bias")
        self.proj.weight.copy_(weight)
        self.proj.bias.copy_(bias)

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D"]:
        return features if self.proj is None else self.proj(features)
