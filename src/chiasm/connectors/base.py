"""The contract of the connector family: patch features in, visual tokens of the language model's width out."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

Grid = tuple[int, int]


class Connector(nn.Module, ABC):
    """Patch features `(B, N, D_v)` → visual tokens `(B, T, D_l)`.

    A connector is built from the widths on both sides, the encoder's grid, and its own keyword-only options; T follows
    from them and is asked for nowhere else. Connectors that attend take any N; those that keep places take N = rows ×
    columns in row-major order, and `num_prefix` class or register tokens in front where they are ready for that.
    """

    takes_prefix: ClassVar[bool] = False
    """Whether class and register tokens may stand in front of the patches; false where the grid is folded."""

    takes_mask: ClassVar[bool] = False
    """Whether `forward` and `attention` also take `patch_mask` `(B, N)`, the patches that are part of the picture."""

    num_prefix: int = 0

    def __init__(self, vision_width: int, language_width: int, grid: Grid) -> None:
        super().__init__()
        self.vision_width = vision_width
        self.language_width = language_width
        self.grid = grid

    @classmethod
    def options_for(cls, tokens: int, grid: Grid) -> dict[str, Any]:
        """The options by which a picture becomes so many visual tokens: the axis `tokens` of a comparison.

        Raises:
            ValueError: none do; the message goes on behind the connector's name.
        """
        raise ValueError("does not say which option sets its tokens; leave tokens null and write it beside the name")

    @property
    def num_features(self) -> int:
        """N: features of one picture."""
        return self.num_prefix + self.grid[0] * self.grid[1]

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """T: visual tokens for one picture."""

    @property
    def width(self) -> int:
        """Width of the visual tokens: D_l, except for connectors that only cross-attention reads."""
        return self.language_width

    @property
    def token_grid(self) -> Grid | None:
        """Rows and columns of the visual tokens behind the prefix, None where a token has no place in the picture."""
        return None

    @property
    def reads_instruction(self) -> bool:
        """Whether `forward` also takes the instruction, as `instruction_ids` and `instruction_mask`, both `(B, L)`."""
        return False

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights; None where there are none."""
        return next((parameter.dtype for parameter in self.parameters()), None)

    @property
    @abstractmethod
    def output(self) -> nn.Linear | None:
        """The last linear layer, whose scale decides how loud the visual tokens are; None where a norm comes last."""

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations of one picture's forward, two for each multiply-add of a matrix product."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        """Visual tokens of a batch of pictures."""

    def attention(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T N"]:
        """The share that every patch has in every visual token; rows sum to 1.

        Connectors that keep places have fixed blocks of patches, those that attend answer with their own weights.
        """
        if self.token_grid is None:
            raise NotImplementedError(f"{type(self).__name__} has tokens without places but does not say what they see")
        shares = torch.block_diag(torch.eye(self.num_prefix), block_attention(self.grid, self.token_grid))
        return shares.to(features).expand(features.shape[0], -1, -1)


class AffineConnector(Connector):
    """A connector that can start as a given affine map, patch by patch: what a closed-form initialisation needs."""

    @classmethod
    def options_for(cls, tokens: int, grid: Grid) -> dict[str, Any]:
        if tokens != grid[0] * grid[1]:
            raise ValueError(f"keeps all {grid[0] * grid[1]} patches, so it cannot give {tokens} tokens")
        return {}

    @property
    @abstractmethod
    def can_be_affine(self) -> bool:
        """Whether its options allow `set_affine`."""

    @abstractmethod
    def set_affine(self, weight: Float[Tensor, "D_l D_v"], bias: Float[Tensor, " D_l"], spread: float) -> None:
        """Become `features @ weight.T + bias`.

        Args:
            weight: the map's matrix.
            bias: the map's offset.
            spread: root mean square of the features, for connectors that choose an inner scale.
        """


class GridConnector(Connector):
    """A connector whose visual tokens stand on a grid of their own."""

    def __init__(self, vision_width: int, language_width: int, grid: Grid, token_grid: Grid) -> None:
        super().__init__(vision_width, language_width, grid)
        self._token_grid = token_grid

    @property
    def num_tokens(self) -> int:
        return self._token_grid[0] * self._token_grid[1]

    @property
    def token_grid(self) -> Grid:
        return self._token_grid


def block_attention(grid: Grid, token_grid: Grid) -> Float[Tensor, "T N"]:
    """Every visual token takes the block of patches below it in equal shares (the bins of adaptive pooling)."""
    down, across = (_shares(patches, tokens) for patches, tokens in zip(grid, token_grid, strict=True))
    return torch.einsum("ar,bc->abrc", down, across).flatten(2).flatten(0, 1)


def _shares(patches: int, tokens: int) -> Float[Tensor, "tokens patches"]:
    shares = torch.zeros(tokens, patches)
    for token in range(tokens):
        shares[token, token * patches // tokens : -(-(token + 1) * patches // tokens)] = 1.0
    return shares / shares.sum(dim=1, keepdim=True)
