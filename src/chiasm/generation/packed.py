"""Weights in 8 or 4 bits, in groups of 32 along the input: int8 with a scale, int4 with a scale and a minimum.

The 4-bit form is llama.cpp's Q4_1 in other words: weights that come from it are kept exactly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

GROUP = 32
WEIGHTS = ("float32", "int8", "int4")


@dataclass(frozen=True)
class Packed:
    """A matrix `(rows, columns)`, as it lies in memory.

    Args:
        kind: one of `WEIGHTS`.
        data: float32; int8 `(rows, groups, 32)`; uint8 `(rows, groups, 16)`, whose byte i holds weights i and i + 16.
        scales, minima: `(rows, groups)` in float16.
    """

    kind: str
    rows: int
    columns: int
    data: Tensor
    scales: Tensor | None = None
    minima: Tensor | None = None
    bias: Tensor | None = None

    @property
    def bytes(self) -> int:
        parts = (self.data, self.scales, self.minima, self.bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The matrix that it stands for."""
        if self.scales is None:
            return self.data
        if self.minima is None:
            return _flat(self.data.float() * self.scales.float()[..., None], self.columns)
        numbers = torch.cat([self.data & 15, self.data >> 4], dim=-1).float()
        return _flat(numbers * self.scales.float()[..., None] + self.minima.float()[..., None], self.columns)


def pack(weight: Float[Tensor, "rows columns"], bias: Tensor | None, kind: str) -> Packed:
    """A matrix in one of the `WEIGHTS`; in float32 it is the tensor itself where that is so already."""
    rows, columns = weight.shape
    bias = None if bias is None else bias.detach().float().contiguous()
    weight = weight.detach().float()
    if kind == "float32":
        return Packed(kind, rows, columns, weight.contiguous(), bias=bias)
    groups = F.pad(weight, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    if kind == "int8":
        scales = (groups.abs().amax(dim=-1) / 127).half()
        numbers = (groups / _divisor(scales)).round().clamp(-127, 127).to(torch.int8)
        return Packed(kind, rows, columns, numbers, scales, bias=bias)
    if kind != "int4":
        raise ValueError(f"weights={kind!r}, expected one of {', '.join(WEIGHTS)}")
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scales, minima = ((high - low) / 15).half(), low.half()
    numbers = ((groups - minima.float()[..., None]) / _divisor(scales)).round().clamp(0, 15).to(torch.uint8)
    data = (numbers[..., :16] | numbers[..., 16:] << 4).contiguous()
    return Packed(kind, rows, columns, data, scales, minima, bias)


def _divisor(scales: Tensor) -> Tensor:
    return scales.float().masked_fill(scales == 0, 1.0)[..., None]


def _flat(groups: Tensor, columns: int) -> Tensor:
    return groups.flatten(1)[:, :columns]
