"""A linear layer that has nothing but its packed weights."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chiasm.generation.native.build import library
from chiasm.generation.native.matrix import unpack
from chiasm.generation.packed import Packed, blocks
from chiasm.language.released import Released

AT_ONCE = 1 << 22
"""Weights that are unpacked together."""


class PackedLinear(Released):
    """Unpacks a part of its matrix at a time, for reading prompts.

    There is nothing in it to train, save or convert: asking for that is an error. Its buffers stay where they are and
    as they are, whatever the model is moved to.
    """

    data: Tensor
    scales: Tensor
    minima: Tensor | None
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.kind, self.out_features, self.in_features = packed.kind, packed.rows, packed.columns
        for name in ("data", "scales", "minima", "bias", "down", "up"):
            self.register_buffer(name, getattr(packed, name), persistent=False)

    @property
    def packed(self) -> Packed:
        parts = (self.data, self.scales, self.minima, self.bias, self.down, self.up)
        return Packed(self.kind, self.out_features, self.in_features, *parts)

    def of_kind(self, weights: str) -> Packed:
        """The packed weights.

        Raises:
            ValueError: others were asked for.
        """
        if weights != self.kind:
            raise ValueError(
                f"weights={weights!r}, but an engine with release=True has left {self.kind!r} of this model; "
                "load the model again"
            )
        return self.packed

    def forward(self, x: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows width"]:
        packed = self.packed
        parts = [
            F.linear(x, _rows(packed, start, stop).to(x.dtype))
            for start, stop in blocks(packed.rows, packed.columns, AT_ONCE)
        ]
        made = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return made if packed.bias is None else made + packed.bias.to(x.dtype)

    @property
    def weight(self) -> NoReturn:
        self.refuse("its weight was asked for")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.refuse("the model cannot be saved")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        return self


def _rows(packed: Packed, start: int, stop: int) -> Float[Tensor, "rows columns"]:
    compiled = library()
    return packed.part(start, stop).dense() if compiled is None else unpack(compiled, packed, start, stop)
