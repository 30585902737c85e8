"""Keys and values of prompts that were read before, in blocks that any prompt with the same beginning takes up again.

A block is known by a hash over all that stands before its end, pictures by their content (as in vLLM's automatic prefix
caching, arXiv 2309.06180).
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.generation.lru import ByteCache

BLOCK = 4
"""Tokens of a block: what a prompt shares with another is read again where it ends within one."""


class PrefixCache:
    """Blocks `(layers, 2, kv_heads, BLOCK, head_dim)` of keys and values.

    Attributes:
        hits, misses: prompts of which a beginning was there, or nothing.
    """

    def __init__(self, limit: int) -> None:
        self.blocks = ByteCache(limit)
        self.hits = self.misses = self.tokens = 0

    def find(self, keys: Sequence[bytes]) -> Float[Tensor, "layers 2 kv_heads length head_dim"] | None:
        """Keys and values of the longest known beginning, which leaves at least one token of the prompt to be read."""
        found = []
        for name in _names(keys[: len(keys) - 1]):
            if name not in self.blocks:
                break
            found.append(name)
        blocks = [self.blocks.get(name) for name in reversed(found)]  # the beginning is kept longest
        self.hits, self.misses = self.hits + bool(found), self.misses + (not found)
        self.tokens += len(found) * BLOCK
        return torch.cat(blocks[::-1], dim=-2) if blocks else None  # type: ignore[arg-type]

    def keep(self, keys: Sequence[bytes], read: Callable[[int, int], Tensor]) -> None:
        """Keeps the whole blocks of a sequence; `read(start, stop)` gives their keys and values.

        The first block is used last, so that it goes last: without it those behind it are never found.
        """
        names = _names(keys)
        for index in range(len(names) - 1, -1, -1):
            if self.blocks.get(names[index]) is None:
                self.blocks.put(names[index], read(index * BLOCK, (index + 1) * BLOCK))


def _names(keys: Sequence[bytes]) -> list[bytes]:
    """A name for each whole block of a sequence, from everything up to its end."""
    names, name = [], b""
    for start in range(0, len(keys) - BLOCK + 1, BLOCK):
        name = hashlib.blake2b(name + b"".join(keys[start : start + BLOCK]), digest_size=16).digest()
        names.append(name)
    return names
