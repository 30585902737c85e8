"""A lean model's step in PyTorch alone, for machines without a C++ compiler; only for weights in float32.

Packed ones would be unpacked beside themselves, since PyTorch's own kernel for int8 is slower than float32 on a
processor without AVX-512.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from chiasm.generation.lean import LeanLayer, LeanModel
from chiasm.generation.packed import Packed
from chiasm.generation.slots import Slots

Matrix = tuple[Tensor, Tensor | None]
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


class TorchStep:
    """The same as `NativeStep`, for one token of each slot."""

    def __init__(self, lean: LeanModel) -> None:
        self.lean = lean
        self._matrices = [{name: _dense(getattr(layer, name)) for name in NAMES} for layer in lean.layers]
        self._head = _dense(lean.head)
        self._rotations: dict[str, Tensor] = {}

    def run(
        self,
        slots: Slots,
        first: int,
        last: int,
        hidden: Float[Tensor, "rows D_l"],
        rows: Int[Tensor, " rows"],
        positions: Int[Tensor, " rows"],
        angles: Int[Tensor, " rows"],
        told: int = 0,
    ) -> Float[Tensor, "told V"]:
        """Layers `first` to `last`, which change `hidden` in place, and the logits of the last `told` rows."""
        if slots.capacity > max((len(table) for table in self._rotations.values()), default=0):
            kinds = {layer.kind for layer in self.lean.layers}
            self._rotations = {kind: self.lean.rotation(kind, slots.capacity) for kind in kinds}
        end = int(positions.max()) + 1
        chosen = slice(int(rows[0]), int(rows[0]) + len(rows))
        view = chosen if rows.tolist() == list(range(chosen.start, chosen.stop)) else rows
        for index in range(first, last):
            layer, matrices = self.lean.layers[index], self._matrices[index]
            q, k, v = self._project(layer, matrices, hidden, angles)
            keys, values = slots.store[index]
            keys[rows, :, positions], values[rows, :, positions] = k, v
            mask = _mask(positions, end, layer.window)
            attended = F.scaled_dot_product_attention(
                q[:, :, None], keys[view, :, :end], values[view, :, :end], mask, scale=self.lean.scale, enable_gqa=True
            )
            hidden += self._after(F.linear(attended.flatten(1), *matrices["o"]), layer.after_attention)
            x = self._normed(hidden, layer.feed_forward_norm)
            gate = F.linear(x, *matrices["gate"])
            inner = (F.gelu(gate, approximate="tanh") if self.lean.gelu else F.silu(gate)) * F.linear(
                x, *matrices["up"]
            )
            hidden += self._after(F.linear(inner, *matrices["down"]), layer.after_feed_forward)
        if not told:
            return hidden.new_empty(0, self.lean.head.rows)
        return F.linear(self._normed(hidden[-told:], self.lean.norm), *self._head)

    def _project(
        self, layer: LeanLayer, matrices: dict[str, Matrix], hidden: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._normed(hidden, layer.attention_norm)
        q, k, v = (F.linear(x, *matrices[name]).unflatten(1, (-1, self.lean.head_dim)) for name in ("q", "k", "v"))
        cosines, sines = self._rotations[layer.kind][angles, None].chunk(2, dim=-1)
        q = q if layer.q_norm is None else self._normed(q, layer.q_norm)
        k = k if layer.k_norm is None else self._normed(k, layer.k_norm)
        return _rotated(q, cosines, sines), _rotated(k, cosines, sines), v

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.lean.eps)

    def _after(self, change: Tensor, norm: Tensor | None) -> Tensor:
        return change if norm is None else self._normed(change, norm)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)


def _mask(positions: Int[Tensor, " rows"], end: int, window: int) -> Tensor:
    places, now = torch.arange(end), positions[:, None, None, None]
    return (places <= now) & (places > now - window) if window else places <= now


def _dense(packed: Packed) -> Matrix:
    return packed.dense(), packed.bias
