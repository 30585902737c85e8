"""Weights in 8 or 4 bits, in groups of 32 along the input: int8 with a scale, int4 with a scale and a minimum.

The 4-bit form is llama.cpp's Q4_1 in other words: weights that come from it are kept exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

GROUP = 32
WEIGHTS = ("float32", "int8", "int4")
DATA = {"int8": torch.int8, "int4": torch.uint8}
AT_ONCE = 1 << 18
"""Weights that are packed together: what packing takes beside the result is a few times this."""


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

    def part(self, start: int, stop: int) -> "Packed":
        """Rows `start` to `stop`, without the bias."""
        data, scales, minima = (
            None if part is None else part[start:stop] for part in (self.data, self.scales, self.minima)
        )
        assert data is not None
        return Packed(self.kind, stop - start, self.columns, data, scales, minima)

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
    return Packed(kind, rows, columns, data, scales, None if kind == "int8" else minima, bias)


def blocks(rows: int, columns: int, numbers: int) -> Iterator[tuple[int, int]]:
    """First and last row of parts of a matrix that have about so many numbers."""
    step = max(1, numbers // columns)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _eight_bits(groups: Float[Tensor, "rows groups 32"]) -> tuple[Tensor, Tensor]:
    scales = (groups.abs().amax(dim=-1) / 127).half()
    return (groups / _divisor(scales)).round().clamp(-127, 127).to(torch.int8), scales


def _four_bits(groups: Float[Tensor, "rows groups 32"]) -> tuple[Tensor, Tensor, Tensor]:
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scales, minima = ((high - low) / 15).half(), low.half()
    numbers = ((groups - minima.float()[..., None]) / _divisor(scales)).round().clamp(0, 15).to(torch.uint8)
    return numbers[..., :16] | numbers[..., 16:] << 4, scales, minima


def _divisor(scales: Tensor) -> Tensor:
    return scales.float().masked_fill(scales == 0, 1.0)[..., None]


def _flat(groups: Tensor, columns: int) -> Tensor:
    return groups.flatten(1)[:, :columns]
