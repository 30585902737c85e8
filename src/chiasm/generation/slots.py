"""A static KV cache with one slot for each request, whose lengths differ; transformers' models write into it."""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

STEP = 256
"""Capacity grows by multiples of so many tokens."""
KEPT = 1024
"""Capacity that stays when no request is there."""

PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Pages that a forked process does not share."""

KeysValues = Float[Tensor, "layers 2 kv_heads length head_dim"]


@dataclass(frozen=True)
class CacheShape:
    """A language model's cache of keys and values, which is the same in every layer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


class Slots:
    """Keys and values of all layers in one tensor `(layers, 2, slots, kv_heads, capacity, head_dim)`, which grows when
    a longer request comes. In memory a slot is in one piece, and takes none where nothing was written yet."""

    def __init__(self, shape: CacheShape, count: int) -> None:
        self.shape, self.count = shape, count
        self.store = self._empty(0)
        self.free = list(range(count - 1, -1, -1))

    @property
    def capacity(self) -> int:
        return self.store.shape[-2]

    @property
    def bytes_per_token(self) -> int:
        shape = self.shape
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.itemsize

    def take(self, length: int) -> int:
        """A free slot with room for so many tokens."""
        if length > self.capacity:
            old, self.store = self.store, self._empty(-(-length // STEP) * STEP)
            for slot in set(range(self.count)) - set(self.free):
                self.write(slot, old[:, :, slot])
        return self.free.pop()

    def leave(self, slot: int) -> None:
        """Frees a slot; when all are free, so is the memory that only long requests need."""
        self.free = sorted([*self.free, slot], reverse=True)
        if len(self.free) == self.count and self.capacity > KEPT:
            self.store = self._empty(0)

    def _empty(self, capacity: int) -> Tensor:
        shape = self.shape
        sizes = (self.count, shape.layers, 2, shape.kv_heads, capacity, shape.head_dim)
        return _zeros(sizes, shape.dtype, torch.device(shape.device)).movedim(0, 2)

    def read(self, slot: int, start: int, stop: int) -> KeysValues:
        """A copy of a slot's keys and values."""
        return self.store[:, :, slot, :, start:stop].clone()

    def write(self, slot: int, keys_values: KeysValues) -> None:
        """Puts a copy back, at the slot's beginning."""
        self.store[:, :, slot, :, : keys_values.shape[-2]] = keys_values


class SlotView(Cache):
    """The cache of one forward: new tokens of some slots, each behind its own earlier ones."""

    def __init__(self, slots: Slots, rows: Sequence[int], positions: Int[Tensor, "B S"]) -> None:
        self.rows = slice(rows[0], rows[0] + len(rows)) if _consecutive(rows) else torch.tensor(rows)
        self.places = (torch.tensor(rows)[:, None], positions.cpu())
        self.end = int(positions.max()) + 1
        super().__init__(layers=[_SlotLayer(pair, self) for pair in slots.store])

    @property
    def is_compileable(self) -> bool:
        return False


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, pair: Float[Tensor, "2 slots kv_heads capacity head_dim"], view: Any) -> None:
        super().__init__()
        self.pair, self.rows, self.places, self.end = pair, view.rows, view.places, view.end
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, positions = self.places
        for index, states in enumerate((key_states, value_states)):
            self.pair[index][rows, :, positions] = states.transpose(1, 2).to(self.pair.dtype)
        keys, values = self.pair[:, self.rows, :, : self.end].to(key_states.dtype)
        return keys, values

    def get_seq_length(self) -> int:
        return self.end - self.places[1].shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0

    def get_max_length(self) -> int:
        return self.pair.shape[-2]


def _zeros(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; those of a CPU are pages that the system hands out when something is written to them."""
    count = math.prod(sizes)
    if device.type != "cpu" or not count:
        return torch.zeros(sizes, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, **PRIVATE), dtype=dtype).view(sizes)


def _consecutive(rows: Sequence[int]) -> bool:
    return list(rows) == list(range(rows[0], rows[0] + len(rows)))
