"""Questions about one picture become one conversation, which pays for the picture once."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from chiasm.data.readers import read
from chiasm.data.schema import ByteRange


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


PICTURES = [b"one", b"two", b"three", b"one", b"two", b"one"]


def ids_of_groups(data: Any) -> list[str]:
    return [sample.id for sample in read(data, merge_questions=8)]


def test_in_shards_the_same_bytes_are_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in (0, 3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number, picture in enumerate(PICTURES[shard : shard + 3], shard):
                words = json.dumps({"question": "?", "answer": "a"}).encode()
                for ending, content in (("png", picture), ("json", words)):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    seen = []
    whole = ByteRange.read
    monkeypatch.setattr(ByteRange, "read", lambda self: (seen.append(self.length), whole(self))[1])
    assert ids_of_groups(tmp_path) == ["0+3+5", "1+4", "2"]
    assert len(b"three") not in seen, "no other picture is as long: its bytes tell nothing"
    sample = read(tmp_path, merge_questions=8)[0].validate()
    assert len(sample.images) == 1 and sample.images[0].source.read() == b"one"


def test_in_hugging_face_data_pictures_are_embedded_or_files() -> None:
    datasets = pytest.importorskip("datasets")
    for key in ("bytes", "path"):
        empty: dict[str, Any] = {"bytes": None, "path": None}
        images = [empty | {key: value if key == "bytes" else value.decode()} for value in PICTURES]
        columns = {"id": list("012345"), "question": ["?"] * 6, "answer": ["a"] * 6, "image": images}
        data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        assert ids_of_groups(data) == ["0+3+5", "1+4", "2"]
