"""Weights in 8 or 4 bits, in groups of 32 along the input: int8 with a scale, int4 with a scale and a minimum.

The 4-bit form is llama.cpp's Q4_1 in other words: weights that come from it are kept exactly. What it loses of others
is kept as a product of two thin matrices (LQER, arXiv 2402.02446). Without it a model that was tuned by LoRA would be
its own base again: adapters change weights by less than a step of the grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

GROUP = 32
WEIGHTS = ("float32", "int8", "int4")
DATA = {"int8": torch.int8, "int4": torch.uint8}
RANK = 16
"""Of what is kept beside 4 bits; of a small matrix a `THINNEST` of its shorter side."""
THINNEST = 12
KEPT = 1e-3
"""A share of the weights that may be lost without a word: what half precision of scales comes to."""
AT_ONCE = 1 << 18
"""Weights that are packed together: packing takes a few times this beside the result, and in int4 the matrix."""


@dataclass(frozen=True)
class Packed:
    """A matrix `(rows, columns)`, as it lies in memory.

    Args:
        kind: one of `WEIGHTS`.
        data: float32; int8 `(rows, groups, 32)`; uint8 `(rows, groups, 16)`, whose byte i holds weights i and i + 16.
        scales, minima: `(rows, groups)` in float16.
        down, up: `(rank, columns)` and `(rows, rank)` in float16, whose product is added; of int4 that lost something.
    """

    kind: str
    rows: int
    columns: int
    data: Tensor
    scales: Tensor | None = None
    minima: Tensor | None = None
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    @property
    def bytes(self) -> int:
        parts = (self.data, self.scales, self.minima, self.bias, self.down, self.up)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def part(self, start: int, stop: int) -> "Packed":
        """Rows `start` to `stop`, without the bias."""
        data, scales, minima, up = (
            None if part is None else part[start:stop] for part in (self.data, self.scales, self.minima, self.up)
        )
        assert data is not None
        return Packed(self.kind, stop - start, self.columns, data, scales, minima, down=self.down, up=up)

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The matrix that it stands for."""
        if self.scales is None:
            return self.data
        if self.minima is None:
            return _flat(self.data.float() * self.scales.float()[..., None], self.columns)
        numbers = torch.cat([self.data & 15, self.data >> 4], dim=-1).float()
        rounded = _flat(numbers * self.scales.float()[..., None] + self.minima.float()[..., None], self.columns)
        return rounded if self.up is None or self.down is None else rounded + self.up.float() @ self.down.float()


def pack(weight: Float[Tensor, "rows columns"], bias: Tensor | None, kind: str) -> Packed:
    """A matrix in one of the `WEIGHTS`; in float32 it is the tensor itself where that is so already."""
    rows, columns = weight.shape
    bias = None if bias is None else bias.detach().float().contiguous()
    if kind == "float32":
        return Packed(kind, rows, columns, weight.detach().float().contiguous(), bias=bias)
    if kind not in WEIGHTS:
        raise ValueError(f"weights={kind!r}, expected one of {', '.join(WEIGHTS)}")
    groups = -(-columns // GROUP)
    data = torch.empty(rows, groups, GROUP if kind == "int8" else GROUP // 2, dtype=DATA[kind])
    scales, minima = (torch.empty(rows, groups, dtype=torch.float16) for _ in range(2))
    for start, stop in blocks(rows, columns, AT_ONCE):
        part = F.pad(weight[start:stop].detach().float(), (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
        if kind == "int8":
            data[start:stop], scales[start:stop] = _eight_bits(part)
        else:
            data[start:stop], scales[start:stop], minima[start:stop] = _four_bits(part)
    if kind == "int8":
        return Packed(kind, rows, columns, data, scales, bias=bias)
    packed = Packed(kind, rows, columns, data, scales, minima, bias)
    lost = torch.empty(rows, columns, device=weight.device)
    for start, stop in blocks(rows, columns, AT_ONCE):
        lost[start:stop] = weight[start:stop].detach().float() - packed.part(start, stop).dense()
    if lost.norm() <= KEPT * weight.norm():
        return packed
    up, down = _thin(lost)
    return replace(packed, up=up.half(), down=down.half())


def blocks(rows: int, columns: int, numbers: int) -> Iterator[tuple[int, int]]:
    """First and last row of parts of a matrix that have about so many numbers."""
    step = max(1, numbers // columns)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _eight_bits(groups: Float[Tensor, "rows groups 32"]) -> tuple[Tensor, Tensor]:
    scales = (groups.abs().amax(dim=-1) / 127).half()
    return (groups / _divisor(scales)).round().clamp(-127, 127).to(torch.int8), scales


class Grid(NamedTuple):
    """Groups as numbers 0 to 15 with a scale and a minimum for each, and their squared error."""

    error: Tensor
    numbers: Tensor
    scales: Tensor
    minima: Tensor

    def closer(self, other: "Grid") -> "Grid":
        """Of each group the one with the smaller error; this one where they are equal."""
        take = other.error < self.error
        pairs = zip(self, other, strict=True)
        return Grid(*(torch.where(take[..., None] if a.ndim > take.ndim else take, b, a) for a, b in pairs))


def _four_bits(groups: Float[Tensor, "rows groups 32"]) -> tuple[Tensor, Tensor, Tensor]:
    """The closest of a few grids: from end to end in 15 steps or in fewer longer ones, and each moved by least squares.

    Weights that were published in such a grid have no error in it, and keep it.
    """
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    best = _grid(groups, (high - low) / 15, low)
    for steps in (15, 14, 13):
        if best.error.any():
            ends = _grid(groups, (high - low) / steps, low)
            best = best.closer(ends).closer(_grid(groups, *_least_squares(groups, ends.numbers)))
    numbers = best.numbers.to(torch.uint8)
    return numbers[..., :16] | numbers[..., 16:] << 4, best.scales, best.minima


def _grid(groups: Tensor, scales: Tensor, minima: Tensor) -> Grid:
    scales, minima = scales.half(), minima.half()
    numbers = ((groups - minima.float()[..., None]) / _divisor(scales)).round_().clamp_(0, 15)
    dense = numbers * scales.float()[..., None] + minima.float()[..., None]
    return Grid((dense - groups).square_().sum(dim=-1), numbers, scales, minima)


def _least_squares(groups: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the line through these numbers that is closest to the weights."""
    centre, middle = numbers.mean(dim=-1, keepdim=True), groups.mean(dim=-1, keepdim=True)
    spread = (numbers - centre).square().sum(dim=-1)
    scales = ((numbers - centre) * (groups - middle)).sum(dim=-1) / spread.clamp(min=1e-6)
    return scales, middle[..., 0] - scales * centre[..., 0]


def _thin(matrix: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    """The two factors of the closest product of a low rank, nearly: a few steps of subspace iteration."""
    rank = min(RANK, max(1, min(matrix.shape) // THINNEST))
    start = torch.randn(matrix.shape[1], rank, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    up = torch.linalg.qr(matrix @ start).Q
    for _ in range(2):
        up = torch.linalg.qr(matrix @ (matrix.T @ up)).Q
    return up.contiguous(), (up.T @ matrix).contiguous()


def _divisor(scales: Tensor) -> Tensor:
    return scales.float().masked_fill(scales == 0, 1.0)[..., None]


def _flat(groups: Tensor, columns: int) -> Tensor:
    return groups.flatten(1)[:, :columns]
