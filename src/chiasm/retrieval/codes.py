"""Rows as 8-bit codes that are scanned with integer arithmetic, and a bound on how far such a score can be off.

Rows are centred and rotated by a random orthogonal matrix, so that no coordinate stands out, and rounded to 8 bits with
one step a row; queries are rounded to 7 bits. The product of the integers is exact, so with q = q' + e and x = x' + f

    |q·x - q'·x'| = |q'·f + e·x| <= |q'| |f| + |e| |x|

by Cauchy-Schwarz. The norms are measured, not estimated: what the bound excludes is certainly not among the nearest.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GROUP = 32
"""Rows whose best score is looked at first."""
LEVELS_OF_A_ROW, LEVELS_OF_A_QUERY = 127, 63
ROUNDING = 1e-5
"""What the rotation and float32 sums may add, relative to the norms."""
TILE = 32_768
"""Vectors whose scores are computed together."""


def supported() -> bool:
    """Whether this processor and this PyTorch have the kernel, and its sums of integers are exact."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (64, 96), generator=generator, dtype=torch.int8)
    codes[0], query = 127, torch.full((1, 96), 63.0)
    try:
        found = _products(query, _pack(codes, torch.ones(64)))
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found, query @ codes.float().T)


class Codes:
    """Codes of the rows of one snapshot. A row is a picture of K vectors; its score is the best of theirs.

    Args:
        chunks: the rows in order, in pieces.
        count: rows in all.
        mean: of all vectors.
    """

    def __init__(
        self,
        chunks: Iterable[Float[Tensor, "rows K D"]],
        count: int,
        shape: tuple[int, int],
        mean: Float[Tensor, " D"],
    ) -> None:
        self.several, width = shape
        normal = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        self.rotation, self.count, self.mean = torch.linalg.qr(normal)[0], count, mean
        padded = -(-count // GROUP) * GROUP * self.several
        codes, steps = torch.zeros(padded, width, dtype=torch.int8), torch.ones(padded)
        self.largest, self.error, start = 0.0, 0.0, 0
        for chunk in chunks:
            for vectors in chunk.flatten(0, 1).split(TILE):
                turned = (vectors - mean) @ self.rotation
                step = turned.abs().amax(dim=1).clamp(min=1e-30) / LEVELS_OF_A_ROW
                levels = (turned / step[:, None]).round()
                here = slice(start, start + len(vectors))
                codes[here], steps[here], start = levels.to(torch.int8), step, start + len(vectors)
                self.largest = max(self.largest, turned.norm(dim=1).max().item())
                self.error = max(self.error, (turned - levels * step[:, None]).norm(dim=1).max().item())
        size = max(1, TILE // (GROUP * self.several)) * GROUP * self.several
        self.tiles = [_pack(*tile) for tile in zip(codes.split(size), steps.split(size), strict=True)]

    def scan(self, queries: Float[Tensor, "B D"], keep: Bool[Tensor, " rows"] | None = None) -> "Scores":
        """Scores of all rows, or of those to keep, tile by tile so that they are still near when they are compared."""
        turned = queries @ self.rotation
        step = turned.abs().amax(dim=1).clamp(min=1e-30) / LEVELS_OF_A_QUERY
        exact = turned / step[:, None]
        levels = exact.round()
        tiles, best, start = [], [], 0
        for packed in self.tiles:
            values = _products(levels, packed)
            if self.several > 1:
                values = values.unflatten(1, (-1, self.several)).amax(dim=2)
            end = start + values.shape[1]
            values[:, max(0, self.count - start) :] = -torch.inf
            if keep is not None:
                values[:, : self.count - start].masked_fill_(~keep[start:end], -torch.inf)
            tiles.append(values.unflatten(1, (GROUP, -1)))
            best.append(tiles[-1].amax(dim=1))
            start = end
        error, size = (exact - levels).norm(dim=1), exact.norm(dim=1)
        bound = (size + error) * self.error + error * self.largest + ROUNDING * size * self.largest
        return Scores(tiles, torch.cat(best, dim=1), bound, step, queries @ self.mean)


@dataclass(frozen=True)
class Scores:
    """Scores of rows by their codes: products of vectors, but for a constant and a factor of each query.

    A tile holds its rows as `GROUP` × groups; `best` are the groups' best ones. None is off by more than `bound`.
    """

    tiles: list[Float[Tensor, "B group groups"]]
    best: Float[Tensor, "B all_groups"]
    bound: Float[Tensor, " B"]
    factor: Float[Tensor, " B"]
    constant: Float[Tensor, " B"]

    def leaders(self, k: int) -> Int[Tensor, "B k"]:
        """The k rows with the highest scores: they are in the k groups with the highest ones."""
        groups = self.best.topk(k, dim=1).indices
        query = torch.arange(len(groups)).repeat_interleave(k)
        values, rows = self._members(query, groups.flatten())
        place = values.view(len(groups), -1).topk(k, dim=1).indices
        return rows.view(len(groups), -1).gather(1, place)

    def reaching(self, product: Float[Tensor, " B"]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Pairs of a query and a row whose product of vectors may be as high as this, in order."""
        limit = (product - self.constant) / self.factor - self.bound
        flat = torch.from_numpy(np.flatnonzero((self.best >= limit[:, None]).numpy()))
        query, group = flat // self.best.shape[1], flat % self.best.shape[1]
        values, rows = self._members(query, group)
        chosen = values >= limit[query, None]
        count = sum(tile.shape[1] * tile.shape[2] for tile in self.tiles)
        pairs = (query[:, None] * count + rows)[chosen].sort().values
        return pairs // count, pairs % count

    def _members(
        self, query: Int[Tensor, " pairs"], group: Int[Tensor, " pairs"]
    ) -> tuple[Float[Tensor, "pairs group"], Int[Tensor, "pairs group"]]:
        """Scores and rows of groups."""
        values, rows = torch.empty(len(group), GROUP), torch.empty(len(group), GROUP, dtype=torch.long)
        member, first = torch.arange(GROUP), 0
        for tile in self.tiles:
            groups = tile.shape[2]
            here = ((group >= first) & (group < first + groups)).nonzero()[:, 0]
            inside = group[here] - first
            values[here] = tile[query[here], :, inside]
            rows[here] = first * GROUP + member * groups + inside[:, None]
            first += groups
        return values, rows


def _pack(codes: Tensor, steps: Tensor) -> Any:
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are announced to go; `supported` notices when they are gone
        zeros = torch.zeros(len(codes), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(codes, steps.double(), zeros, 0)
        try:
            torch.backends.quantized.engine = "fbgemm"
            return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = engine


def _products(levels: Float[Tensor, "B D"], packed: Any) -> Float[Tensor, "B rows"]:
    """Sums of integers times each row's step. A last query with both ends of the range pins the kernel's step to 1."""
    ends = torch.zeros(1, levels.shape[1])
    ends[0, 0], ends[0, -1] = -LEVELS_OF_A_QUERY, LEVELS_OF_A_QUERY + 1
    return torch.ops.quantized.linear_dynamic(torch.cat([levels, ends]), packed, True)[:-1]
