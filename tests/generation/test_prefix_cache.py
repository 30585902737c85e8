"""Which blocks of prompts a full cache lets go: ends, since a beginning is found without them and not the reverse."""

import torch
from torch import Tensor

from chiasm.generation.prefix_cache import BLOCK, PrefixCache
from chiasm.generation.prompt import word

SIZE = 4 * BLOCK
"""Bytes of a block below."""


def read(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, dtype=torch.float32).reshape(1, 1, 1, -1, 1)


def prompt(length: int, first: int = 0) -> list[bytes]:
    return [word(token) for token in range(first, first + length)]


def found(cache: PrefixCache, keys: list[bytes]) -> int:
    known = cache.find(keys)
    if known is None:
        return 0
    assert torch.equal(known, read(0, known.shape[-2]))
    return known.shape[-2]


def test_a_prompt_longer_than_the_limit_finds_its_beginning() -> None:
    cache, keys = PrefixCache(100 * SIZE), prompt(500)
    for _ in range(3):
        cache.keep(keys, read)
        assert cache.blocks.bytes == cache.blocks.limit and found(cache, keys) == 400


def test_a_beginning_that_prompts_share_outlives_their_ends() -> None:
    cache, shared = PrefixCache(10 * SIZE), prompt(3 * BLOCK)
    one, other = (shared + prompt(2 * BLOCK + 1, first) for first in (100, 200))
    cache.keep(one, read)
    cache.keep(other, read)
    cache.keep(prompt(6 * BLOCK, 300), read)
    assert found(cache, one) == 3 * BLOCK and found(cache, other) == 4 * BLOCK
