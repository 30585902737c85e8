"""A plan of two cells on tiny models in folders, which takes seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import chiasm
import tiny
from chiasm.comparison import cell

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}


def _data(folder: Path, count: int, shift: int) -> str:
    """LLaVA JSON with pictures of one colour each."""
    folder.mkdir()
    rows = []
    for number in range(count):
        name = list(COLOURS)[number % 3]
        tint = tuple(min(255, channel + shift + number) for channel in COLOURS[name])
        Image.new("RGB", (30, 30 + number), tint).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": name}]
        rows.append({"id": f"{shift}-{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return str(folder / "data.json")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "cache"))
    tiny.vision().save_pretrained(tmp_path / "vision")
    tiny.language().save_pretrained(tmp_path / "language")
    tiny.tokenizer().save_pretrained(tmp_path / "language")
    size = {"height": 30, "width": 30}
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": size, "do_center_crop": False, "do_resize": True}
    moments = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "do_rescale": True}
    (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(pixels | moments))
    return {
        "title": "Two ways",
        "base": {"vision": str(tmp_path / "vision"), "language": str(tmp_path / "language")},
        "data": {"train": _data(tmp_path / "train", 18, 0), "test": _data(tmp_path / "test", 12, 20)},
        "budget": {"samples": 8},
        "grid": {"connector": ["linear", tiny.connector("perceiver_resampler")], "tune": ["frozen"]},
        "training": {"dtype": "float32", "validations": 2, "validation_samples": 2},
        "evaluation": {"max_new_tokens": 3, "repeats": 1, "pictures": 12},
    }


@pytest.fixture
def stop_when_trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any], Path], None]:
    """Begins a plan's first cell in a folder, and stops when it is trained and not yet asked."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def begin(plan: dict[str, Any], folder: Path) -> None:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(cell, "_evaluate", stop)
            chiasm.compare(plan, folder, only=["linear-early-frozen-seed0"])

    return begin
