"""Spatial-window resampler: the grid is cut into windows, and one learned query looks at each."""

import torch
from torch import Tensor, nn

from chiasm.connectors import GridConnector


class WindowResampler(GridConnector):
    """A visual token is what a window's query sees of the patches in its window.

    Args:
        windows: rows and columns of windows, which divide the grid; by default every row of patches is one.
        heads: of the attention, which divide the encoder's width.
    """

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        grid: tuple[int, int],
        *,
        windows: list | None = None,
        heads: int = 4,
    ) -> None:
        rows, columns = windows or (grid[0], 1)
        if grid[0] % rows or grid[1] % columns:
            raise ValueError(f"connector window has windows {rows}×{columns}, which do not divide the grid {grid}")
        super().__init__(vision_width, language_width, grid, (rows, columns))
        self.cut = (rows, grid[0] // rows, columns, grid[1] // columns)
        self.queries = nn.Parameter(torch.randn(self.num_tokens, vision_width))
        self.attend = nn.MultiheadAttention(vision_width, heads, batch_first=True)
        self.out = nn.Linear(vision_width, language_width)

    @property
    def output(self) -> nn.Linear:
        return self.out

    def flops(self) -> int:
        patches, tokens, width = self.num_features, self.num_tokens, self.vision_width
        keys_and_values, queries_and_output = 4 * patches * width**2, 4 * tokens * width**2
        return keys_and_values + queries_and_output + 4 * patches * width + 2 * tokens * self.out.weight.numel()

    def _windows(self, patches: Tensor) -> Tensor:
        """`(B, N, ...)` → `(B, T, N / T, ...)`."""
        return patches.unflatten(1, self.cut).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _look(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What every query sees `(B, T, D_v)`, and the shares of the patches in its window `(B, T, N / T)`."""
        cells, batch = self._windows(features).flatten(0, 1), features.shape[0]
        queries = self.queries.expand(batch, -1, -1).flatten(0, 1).unsqueeze(1)
        seen, shares = self.attend(queries, cells, cells)
        return seen.unflatten(0, (batch, -1)).squeeze(2), shares.unflatten(0, (batch, -1)).squeeze(2)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(self._look(features)[0])

    def attention(self, features: Tensor) -> Tensor:
        shares = self._look(features)[1]
        places = self._windows(torch.arange(self.num_features, device=features.device)[None])
        return shares.new_zeros(*shares.shape[:2], self.num_features).scatter(2, places.expand_as(shares), shares)


CONNECTORS = {"window": WindowResampler}
