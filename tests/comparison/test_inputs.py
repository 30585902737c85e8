"""A comparison goes on with the data and the models that it began with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chiasm


@pytest.mark.parametrize("changed", ["train/data.json", "language/model.safetensors"])
def test_a_comparison_does_not_go_on_with_other_data(plan: dict[str, Any], changed: str, tmp_path: Path) -> None:
    chiasm.compare(plan, tmp_path / "run", only=["linear-early-frozen"])
    content = (tmp_path / changed).read_bytes()
    (tmp_path / changed).write_bytes(content[:-9] + bytes(reversed(content[-9:])))
    with pytest.raises(ValueError, match=f"{changed} has changed since .*linear-early-frozen-seed0 was begun"):
        chiasm.compare(plan, tmp_path / "run")
    (tmp_path / changed).write_bytes(content)
    assert chiasm.compare(plan, tmp_path / "run", only=["linear-early-frozen"]).results


def test_a_run_begun_on_other_data_starts_anew(
    plan: dict[str, Any], tmp_path: Path, stop_when_trained: Callable[[dict[str, Any], Path], None]
) -> None:
    stop_when_trained(plan, tmp_path / "run")
    data = tmp_path / "train/data.json"
    data.write_text(data.read_text().replace("green", "olive"))
    again = chiasm.compare(plan, tmp_path / "run", only=["linear-early-frozen"]).results[0]
    fresh = chiasm.compare(plan, tmp_path / "fresh", only=["linear-early-frozen"]).results[0]
    assert again["training"]["curve"] == fresh["training"]["curve"]
