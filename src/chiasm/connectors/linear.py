"""Linear projector: one matrix from the encoder's space to the language model's (LLaVA, arXiv 2304.08485)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.base import AffineConnector, Grid


class LinearProjector(AffineConnector):
    """Every patch becomes one visual token: T = N."""

    takes_prefix = True

    def __init__(self, vision_width: int, language_width: int, grid: Grid, *, bias: bool = True) -> None:
        super().__init__(vision_width, language_width, grid)
        self.proj = nn.Linear(vision_width, language_width, bias=bias)

    @property
    def num_tokens(self) -> int:
        return self.num_features

    @property
    def token_grid(self) -> Grid:
        return self.grid

    @property
    def output(self) -> nn.Linear:
        return self.proj

    def flops(self) -> int:
        return 2 * self.num_tokens * self.vision_width * self.language_width

    @torch.no_grad()
    def set_affine(self, weight: Float[Tensor, "D_l D_v"], bias: Float[Tensor, " D_l"], spread: float) -> None:
        self.proj.weight.copy_(weight)
        if self.proj.bias is None:
            raise ValueError(
                "init: closed_form needs a bias, got connector linear with bias: false; remove that option"
            )
        self.proj.bias.copy_(bias)

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        return self.proj(features)
