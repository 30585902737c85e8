"""Only a missing file means that there is none; a damaged one, and a hub that cannot be reached, are one line each."""

import time
from pathlib import Path
from typing import Any

import pytest

import chiasm
import tiny
from chiasm.sources import SourceError
from chiasm.sources.files import find_file, read_json
from chiasm.vision.image_processor import ChiasmImageProcessor


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of a tiny connected model."""
    images = ChiasmImageProcessor(30, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer(), image_processor=images)
    vlm.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert find_file(tmp_path, "config.json") is None
    assert read_json(tmp_path, "config.json") is None
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_json(tmp_path, "config.json") == {"a": 1}


@pytest.mark.parametrize("content", ["{cut", "[1, 2]", ""])
@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_a_damaged_file_is_named(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    with pytest.raises(ValueError, match=name) as caught:
        chiasm.load(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer*"])
def test_a_model_without_processor_files_loads(model: Path, name: str) -> None:
    for path in model.glob(name):
        path.unlink()
    vlm = chiasm.load(model)
    with pytest.raises(ValueError, match="has no processor"):
        _ = vlm.processor


def test_an_encoders_damaged_image_settings_are_named(tmp_path: Path) -> None:
    tiny.vision().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{cut")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is damaged"):
        chiasm.connect(str(tmp_path), tiny.language(), tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("part", ["model", "vision", "language"])
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(
    part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr("chiasm.sources.files.get_hf_file_metadata", unreachable)
    started = time.monotonic()
    with pytest.raises(SourceError, match="'nobody/nothing' is not in the cache and the hub cannot be reached") as told:
        if part == "model":
            chiasm.load("nobody/nothing")
        else:
            given: dict[str, Any] = {"vision": tiny.vision(), "language": tiny.language(), part: "nobody/nothing"}
            chiasm.connect(**given, tokenizer=tiny.tokenizer())
    assert len(str(told.value)) < 200 and "\n" not in str(told.value)
    assert time.monotonic() - started < 2
