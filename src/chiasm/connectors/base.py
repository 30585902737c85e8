"""The contract of the connector family: patch features in, visual tokens of the language model's width out."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Connector(nn.Module, ABC):
    """Patch features `(B, N, D_v)` → visual tokens `(B, T, D_l)`.

    A connector is built from the widths on both sides, the encoder's grid, and its own keyword-only options; T follows
    from the grid and is asked for nowhere else.
    """

    def __init__(self, vision_width: int, language_width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.vision_width = vision_width
        self.language_width = language_width
        self.grid = grid

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """T: visual tokens for one picture."""

    @property
    @abstractmethod
    def output(self) -> nn.Linear:
        """The last linear layer, whose scale decides how loud the visual tokens are."""

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations of one picture's forward, two for each multiply-add of a matrix product."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D_l"]:
        """Visual tokens of a batch of pictures."""


class AffineConnector(Connector):
    """A connector that can start as a given affine map, patch by patch: what a closed-form initialisation needs."""

    @abstractmethod
    def set_affine(self, weight: Float[Tensor, "D_l D_v"], bias: Float[Tensor, " D_l"], spread: float) -> None:
        """Become `features @ weight.T + bias`.

        Args:
            weight: the map's matrix.
            bias: the map's offset.
            spread: root mean square of the features, for connectors that choose an inner scale.
        """
