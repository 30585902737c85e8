"""A lean model's step in PyTorch alone, for machines without a C++ compiler: PyTorch's own packed kernels."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from chiasm.generation.lean import LeanLayer, LeanModel
from chiasm.generation.packed import GROUP, Packed
from chiasm.generation.slots import Slots

Product = Callable[[Tensor], Tensor]
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


class TorchStep:
    """The same as `NativeStep`, for one token of each slot."""

    def __init__(self, lean: LeanModel) -> None:
        self.lean = lean
        self._products = [{name: product(getattr(layer, name)) for name in NAMES} for layer in lean.layers]
        self._head = product(lean.head)
        self._rotations: dict[str, Tensor] = {}

    def run(
        self,
        slots: Slots,
        first: int,
        last: int,
        hidden: Float[Tensor, "rows D_l"],
        rows: Int[Tensor, " rows"],
        positions: Int[Tensor, " rows"],
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
            layer, product = self.lean.layers[index], self._products[index]
            q, k, v = self._project(layer, product, hidden, positions)
            keys, values = slots.store[index]
            keys[rows, :, positions], values[rows, :, positions] = k, v
            mask = _mask(positions, end, layer.window)
            attended = F.scaled_dot_product_attention(
                q[:, :, None], keys[view, :, :end], values[view, :, :end], mask, scale=self.lean.scale, enable_gqa=True
            )
            hidden += self._after(product["o"](attended.flatten(1)), layer.after_attention)
            x = self._normed(hidden, layer.feed_forward_norm)
            gate = product["gate"](x)
            inner = (F.gelu(gate, approximate="tanh") if self.lean.gelu else F.silu(gate)) * product["up"](x)
            hidden += self._after(product["down"](inner), layer.after_feed_forward)
        if not told:
            return hidden.new_empty(0, self.lean.head.rows)
        return self._head(self._normed(hidden[-told:], self.lean.norm))

    def _project(
        self, layer: LeanLayer, product: dict[str, Product], hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._normed(hidden, layer.attention_norm)
        q, k, v = (product[name](x).unflatten(1, (-1, self.lean.head_dim)) for name in ("q", "k", "v"))
        cosines, sines = self._rotations[layer.kind][positions, None].chunk(2, dim=-1)
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


def product(packed: Packed) -> Product:
    """x → x · wᵀ + bias. In int8 PyTorch's kernel has one scale for a whole row."""
    bias = packed.bias
    multiply = _int4(packed) if packed.kind == "int4" else _int8(packed) if packed.kind == "int8" else None
    if multiply is None:
        weight = packed.dense()
        return lambda x: F.linear(x, weight, bias)
    return multiply if bias is None else lambda x: multiply(x) + bias


def _int8(packed: Packed) -> Product:
    weight = packed.dense()
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)
    numbers = (weight / scales[:, None]).round().to(torch.int8)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, numbers, scales)


def _int4(packed: Packed) -> Product | None:
    """None where the kernel does not take the matrix's shape."""
    if packed.rows % 16 or packed.columns % GROUP or packed.scales is None or packed.minima is None:
        return None
    numbers = torch.cat([packed.data & 15, packed.data >> 4], dim=-1).flatten(1).int()
    matrix = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    scales = packed.scales.float()
    pairs = torch.stack([scales, packed.minima.float() + 8 * scales], dim=-1).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, matrix, GROUP, pairs)
