"""Pictures that were moved or renamed, and copies: their vectors are made once, their paths are those that exist."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chiasm.data.schema import ImageRef
from chiasm.retrieval import Index, Item, read_pictures
from retrieval.pretend import ColourEncoder, paint

Make = Callable[[Any], Index]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    paint(tmp_path / "photos", 8)
    (tmp_path / "photos" / "metadata.jsonl").unlink()
    return tmp_path / "photos"


def paths(index: Index) -> dict[str, Path | None]:
    return {hit.id: hit.path for hit in index.items()}


def expected(photos: Path) -> dict[str, Path]:
    return {file.relative_to(photos).as_posix(): file.resolve() for file in sorted(photos.glob("**/*.png"))}


def move(photos: Path, old: str, new: str) -> None:
    (photos / new).parent.mkdir(exist_ok=True)
    (photos / old).rename(photos / new)


@pytest.mark.parametrize("several", [0, 3])
def test_a_moved_picture_is_where_it_is_now(make: Make, photos: Path, several: int) -> None:
    encoder = ColourEncoder(several)
    index = make(encoder)
    index.add(read_pictures(photos))
    before, hit = encoder.looked_at, index.search("red", 1)[0]
    move(photos, "000.png", "2019/first.png")
    move(photos, "003.png", "002.png")
    report = index.add(read_pictures(photos), batch_size=3)
    assert report.summary() == "0 added, 2 moved, 5 already there" and encoder.looked_at == before
    assert report.moved == ["002.png", "2019/first.png"]
    assert paths(index) == expected(photos) and len(index) == 7
    found = index.search("red", 1)[0]
    assert (found.id, found.score) == ("2019/first.png", pytest.approx(hit.score))
    assert index.search("white", 1)[0].path == (photos / "002.png").resolve()
    assert index.add(read_pictures(photos)).summary() == "0 added, 7 already there"


def test_an_id_that_is_free_again_is_another_picture(make: Make, photos: Path) -> None:
    index = make(ColourEncoder())
    index.add(read_pictures(photos))
    move(photos, "000.png", "2019/000.png")
    Image.new("RGB", (16, 16), (130, 130, 130)).save(photos / "new.png")
    moved, new = ImageRef.of(photos / "2019" / "000.png"), ImageRef.of(photos / "new.png")
    report = index.add([Item("2019/000.png", moved), Item("000.png", new)], batch_size=1)
    assert (report.moved, report.added) == (["2019/000.png"], ["000.png"])
    assert len(index) == 9 and paths(index)["000.png"] == (photos / "new.png").resolve()
    assert index.search_images([photos / "new.png"], 1)[0][0].id == "000.png"


def test_pictures_swap_their_names(make: Make, photos: Path) -> None:
    index = make(ColourEncoder())
    index.add(read_pictures(photos))
    move(photos, "000.png", "x.png")
    move(photos, "001.png", "000.png")
    move(photos, "x.png", "001.png")
    assert index.add(read_pictures(photos)).replaced == ["000.png", "001.png"]
    assert paths(index) == expected(photos)
    assert [index.search(colour, 1)[0].id for colour in ("red", "green")] == ["001.png", "000.png"]


def test_copies_that_were_moved_have_moved(make: Make, photos: Path) -> None:
    (photos / "copy.png").write_bytes((photos / "000.png").read_bytes())
    index = make(ColourEncoder())
    index.add(read_pictures(photos))
    move(photos, "000.png", "2019/000.png")
    move(photos, "copy.png", "2019/copy.png")
    (photos / "2019" / "third.png").write_bytes((photos / "2019" / "copy.png").read_bytes())
    report = index.add(read_pictures(photos))
    assert report.summary() == "1 added, 2 moved, 7 already there" and paths(index) == expected(photos)


def test_a_picture_whose_file_cannot_be_looked_at_stays(make: Make, photos: Path) -> None:
    index, file = make(ColourEncoder()), photos / "000.png"
    index.add(read_pictures(file))
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(file)
    assert index.add([Item("copy.png", ImageRef.of(content))]).added == ["copy.png"]
    assert set(paths(index)) == {"000.png", "copy.png"}


def test_a_move_is_one_step(tmp_path: Path, photos: Path) -> None:
    index = Index.create(tmp_path / "index", ColourEncoder())
    index.add(read_pictures(photos))
    manifest = tmp_path / "index" / "manifest.json"
    before = json.loads(manifest.read_text())["version"]
    move(photos, "000.png", "2019/000.png")
    index.add(read_pictures(photos))
    assert json.loads(manifest.read_text())["version"] == before + 1
    assert paths(Index.open(tmp_path / "index")) == expected(photos)


def test_a_move_is_one_request(photos: Path) -> None:
    pytest.importorskip("qdrant_client")
    from retrieval.qdrant_double import Double, served

    double = Double()
    with served(double) as address:
        index = Index.create(f"{address}/mine", ColourEncoder())
        index.add(read_pictures(photos))
        double.calls.clear()
        move(photos, "000.png", "2019/000.png")
        index.add(read_pictures(photos))
        writes = [path for _, path in double.calls if path.endswith(("/points/batch", "/points/delete"))]
        assert writes == ["/collections/mine/points/batch"]
        assert ("PUT", "/collections/mine/points") not in double.calls and paths(index) == expected(photos)


def test_a_picture_of_another_folder_does_not_take_the_place_of_one(make: Make, photos: Path, tmp_path: Path) -> None:
    """Cameras number from the beginning again."""
    index = make(ColourEncoder())
    index.add(read_pictures(photos))
    other = tmp_path / "other"
    paint(other, 1)
    Image.new("RGB", (16, 16), (90, 90, 90)).save(other / "000.png")
    told = rf"{other}/000\.png would take the place of {photos}/000\.png, .* add the folder above both"
    with pytest.raises(ValueError, match=told):
        index.add(read_pictures(other))
    paint(other, 1, start=9)
    report = index.add(read_pictures(other), skip_bad=True)
    assert report.added == ["009.png"] and list(report.bad) == ["000.png"]
    assert paths(index)["000.png"] == (photos / "000.png").resolve()
    (photos / "000.png").unlink()
    assert index.add(read_pictures(other)).replaced == ["000.png"]
    new = ImageRef.of(photos / "001.png")
    assert index.add([Item("002.png", new)]).replaced == ["002.png"], "an id of one's own is what one says"


def test_a_link_may_lead_to_another_picture(make: Make, photos: Path) -> None:
    (photos / "newest.png").symlink_to(photos / "000.png")
    index = make(ColourEncoder())
    index.add(read_pictures(photos))
    (photos / "newest.png").unlink()
    (photos / "newest.png").symlink_to(photos / "001.png")
    assert index.add(read_pictures(photos)).replaced == ["newest.png"]
