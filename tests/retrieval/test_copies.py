"""Identical pictures under several ids: one encoding, a record each, and one place among what is found."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chiasm.data.schema import ImageRef
from chiasm.retrieval import Item, read_pictures
from retrieval.pretend import COLOURS, ColourEncoder, paint


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pictures, and a copy of the red ones."""
    files = paint(tmp_path / "photos", 8)
    with (tmp_path / "photos" / "metadata.jsonl").open("a") as rows:
        for file in (files[0], files[4]):
            shutil.copy(file, file.with_name(f"copy{file.name}"))
            rows.write(f'{{"file_name": "copy{file.name}", "colour": "red", "album": "b"}}\n')
    return tmp_path / "photos"


@pytest.mark.parametrize("several", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_copy_is_a_record_that_is_not_encoded(make: Any, photos: Path, several: int, batch_size: int) -> None:
    encoder = ColourEncoder(several)
    index = make(encoder)
    before = encoder.looked_at
    assert index.add(read_pictures(photos), batch_size=batch_size).summary() == "10 added"
    assert encoder.looked_at - before == 8 and len(index) == 10
    assert index.add(read_pictures(photos)).summary() == "0 added, 10 already there"
    assert {hit.id for hit in index.search("red", 9, where="album=b")} == {"copy000.png", "copy004.png"}
    assert index.search_images([photos / "000.png"], 1, where="album=b")[0][0].id == "copy000.png"
    assert index.delete(["000.png"]) == ["000.png"] and index.search("red", 1)[0].id == "copy000.png"
    assert len(index.delete(where="album=b")) == 2 and len(index) == 7


def test_copies_across_commits(make: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.retrieval.adding.COMMIT_ITEMS", 1)
    encoder = ColourEncoder()
    index = make(encoder)
    before = encoder.looked_at
    index.add(read_pictures(photos), batch_size=1)
    assert encoder.looked_at - before == 8
    scores = {hit.id: hit.score for hit in index.search("red", 99, copies=True)}
    assert len(scores) == 10 and scores["000.png"] == pytest.approx(scores["copy000.png"])


@pytest.mark.parametrize("several", [0, 3])
def test_the_same_content_is_shown_once_unless_asked(make: Any, photos: Path, several: int) -> None:
    index = make(ColourEncoder(several))
    index.add(read_pictures(photos))
    image = ImageRef.of(photos / "000.png")
    index.add([Item(f"more{number}", image, {"colour": "red"}) for number in range(20)])
    assert len(index) == 30
    (once,), (every,) = (index.search_images([photos / "000.png"], 3, copies=copies) for copies in (False, True))
    assert len({hit.record["key"] for hit in once}) == 3 and len({hit.record["key"] for hit in every}) == 1
    assert len(index.search("red", 99)) == 8 and len(index.search("red", 99, copies=True)) == 30
    assert len(index.search("red", 2, where="colour=red")) == 2
    for copies in (False, True):
        (alone,) = index.search_images([photos / "000.png"], 5, exclude_self=True, copies=copies)
        assert len(alone) == 5 and image.key() not in {hit.record["key"] for hit in alone}
    with pytest.raises(ValueError, match="k is 0, expected at least 1"):
        index.search_images([photos / "000.png"], 0, exclude_self=True)


def test_a_copy_outlives_the_change_of_its_original(make: Any, photos: Path) -> None:
    encoder = ColourEncoder()
    index = make(encoder)
    index.add(read_pictures(photos / "000.png"))
    before = encoder.looked_at
    Image.new("RGB", (16, 16), COLOURS["blue"]).save(photos / "000.png")
    report = index.add(Item(name, ImageRef.of(photos / name)) for name in ("copy000.png", "000.png"))
    assert (report.added, report.replaced) == (["copy000.png"], ["000.png"]) and encoder.looked_at == before + 1
    assert [index.search(colour, 1)[0].id for colour in ("red", "blue")] == ["copy000.png", "000.png"]
