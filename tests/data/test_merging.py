"""Questions about one picture become one conversation, which pays for the picture once."""

import json
from pathlib import Path

import pytest

from chiasm.data.readers import read


def question(folder: Path, name: str, picture: str | None, words: str = "?") -> dict:
    said = [{"from": "human", "value": ("<image>\n" if picture else "") + words}, {"from": "gpt", "value": name}]
    return {"id": name, "conversations": said} | ({"image": picture} if picture else {})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(b"")
    shown = ["x.png", "y.png", "x.png", None, "x.png", "y.png"]
    rows = [question(tmp_path, str(index), picture) for index, picture in enumerate(shown)]
    rows.append({"id": "bad", "image": "x.png", "conversations": []})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "mix.yaml").write_text("- {path: data.json, merge_questions: 2}\n")
    return tmp_path


def test_questions_about_one_picture_are_joined(data: Path) -> None:
    merged = read(data / "data.json", merge_questions=8)
    assert list(merged.ids())[:3] == ["0+2+4", "1+5", "3"] and len(merged) == 4
    sample = merged[0].validate()
    assert [message["role"] for message in sample.messages] == ["user", "assistant"] * 3
    assert len(sample.images) == 1 and sample.answer == "4"
    with pytest.raises(ValueError, match="bad"):
        merged[3]


def test_at_most_so_many_and_in_mixtures(data: Path) -> None:
    assert [sample.id for sample in read(data / "mix.yaml")[:4]] == ["0+2", "1+5", "3", "4"]
    with pytest.raises(ValueError, match="merge_questions is 0, expected a whole number above 0"):
        read(data / "data.json", merge_questions=0)
