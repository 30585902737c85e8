"""Slots take memory where something was written, and keep what is in them when they grow."""

import sys
from pathlib import Path

import pytest
import torch

from chiasm.generation.slots import KEPT, CacheShape, Slots


def resident() -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_empty_slots_take_no_memory() -> None:
    slots = Slots(CacheShape(8, 4, 64), 16)
    before = resident()
    slot = slots.take(2048)
    assert slots.store.numel() * 4 > 500 << 20 and resident() - before < 50 << 20
    slots.write(slot, torch.randn(8, 2, 4, 100, 64))
    slots.take(4096)
    assert slots.store.numel() * 4 > 1000 << 20 and resident() - before < 50 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_grow_with_what_is_in_them(dtype: torch.dtype) -> None:
    slots = Slots(CacheShape(3, 2, 5, dtype), 4)
    assert slots.capacity == 0
    first, second = slots.take(10), slots.take(10)
    known = torch.randn(3, 2, 2, 10, 5).to(dtype)
    slots.write(first, known)
    slots.write(second, -known)
    slots.take(KEPT + 1)
    assert torch.equal(slots.read(first, 0, 10), known) and torch.equal(slots.read(second, 0, 10), -known)
    assert slots.capacity > KEPT and not slots.read(first, 10, KEPT).any()
    for slot in set(range(4)) - set(slots.free):
        slots.leave(slot)
    assert slots.capacity == 0 and len(slots.free) == 4
