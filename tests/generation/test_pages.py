"""Pages of a file of weights leave memory and come back; nothing that was written is lost."""

import sys
from pathlib import Path

import pytest
import torch

from chiasm.generation.pages import drop, trim

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


def test_what_is_in_a_file_comes_back(tmp_path: Path) -> None:
    numbers = torch.randn(50_000)
    (tmp_path / "weights").write_bytes(numbers.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=50_000)
    assert torch.equal(mapped, numbers)
    assert drop(mapped[3:]) and torch.equal(mapped, numbers)
    mapped[30_000] = 7.0
    assert not drop(mapped) and mapped[30_000] == 7.0
    assert drop(mapped[:20_000]) and torch.equal(mapped[:20_000], numbers[:20_000])


def test_other_memory_is_left_alone() -> None:
    numbers = torch.arange(50_000)
    assert not drop(numbers) and not drop(numbers[:10])
    trim()
    assert torch.equal(numbers, torch.arange(50_000))
