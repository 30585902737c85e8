"""MLP projector: Linear – activation – Linear, of any depth and width (LLaVA-1.5, arXiv 2310.03744)."""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from chiasm.connectors.base import AffineConnector, Grid


class MLPProjector(AffineConnector):
    """Every patch becomes one visual token through `depth` linear layers with an activation between them: T = N.

    Args:
        depth: number of linear layers, 2 in LLaVA-1.5.
        width: inner width, D_l when it is None as in LLaVA-1.5.
        bias: whether the linear layers have one.
        activation: a name of transformers' `ACT2FN`.
    """

    takes_prefix = True

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        grid: Grid,
        *,
        depth: int = 2,
        width: int | None = None,
        bias: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__(vision_width, language_width, grid)
        if depth < 2:
            raise ValueError(
                f"connector mlp has depth={depth}, expected at least 2; for one layer take connector linear"
            )
        if activation not in ACT2FN:
            raise ValueError(
                f"connector mlp has activation={activation!r}, which is unknown; choose one of {', '.join(ACT2FN)}"
            )
        inner = width or language_width
        widths = [vision_width, *[inner] * (depth - 1), language_width]
        self.layers: Any = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(widths))
        self.activation: nn.Module = ACT2FN[activation]

    @property
    def num_tokens(self) -> int:
        return self.num_features

    @property
    def token_grid(self) -> Grid:
        return self.grid

    @property
    def output(self) -> nn.Linear:
        return self.layers[-1]

    def flops(self) -> int:
        return 2 * self.num_tokens * sum(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def can_be_affine(self) -> bool:
        """With depth 2, a bias, and an activation f for which f(x) − f(−x) = x."""
        first = self.layers[0].weight
        probe = torch.linspace(-3, 3, 13, device=first.device, dtype=first.dtype)
        passes = torch.allclose(self.activation(probe) - self.activation(-probe), probe, atol=1e-2)
        return passes and len(self.layers) == 2 and self.output.bias is not None

    @torch.no_grad()
    def set_affine(self, weight: Float[Tensor, "D_l D_v"], bias: Float[Tensor, " D_l"], spread: float) -> None:
        """The best map of rank width / 2, exactly: GELU(x) − GELU(−x) = x, so opposite units pass x through.

        Other gates of x by a symmetric share (SiLU, quick GELU, ReLU) do so as well.
        """
        if not self.can_be_affine:
            raise ValueError("connector mlp is an affine map only with depth 2, a bias and an activation such as gelu")
        first, last = self.layers[0], self.layers[1]
        pairs = first.out_features // 2
        left, strength, right = torch.linalg.svd(weight.double(), full_matrices=False)
        rank = min(pairs, strength.numel())
        read = right[:rank] / spread
        write = left[:, :rank] * (strength[:rank] * spread)
        first.weight.zero_()
        first.bias.zero_()
        last.weight.zero_()
        first.weight[:rank].copy_(read)
        first.weight[pairs : pairs + rank].copy_(-read)
        last.weight[:, :rank].copy_(write)
        last.weight[:, pairs : pairs + rank].copy_(-write)
        last.bias.copy_(bias)
        self._wake(first, last, rank, pairs)

    @staticmethod
    def _wake(first: nn.Linear, last: nn.Linear, rank: int, pairs: int) -> None:
        """Units that the map leaves idle get small random inputs and no output, so that training can use them."""
        idle = [*range(rank, pairs), *range(pairs + rank, first.out_features)]
        if idle:
            first.weight[idle] = torch.randn_like(first.weight[idle]) / first.in_features**0.5
            last.weight[:, idle] = 0.0

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        for layer in self.layers[:-1]:
            features = self.activation(layer(features))
        return self.layers[-1](features)
