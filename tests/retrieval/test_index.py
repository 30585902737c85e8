"""An index in a folder and one on a Qdrant server answer alike: found by text and picture, added, replaced, deleted."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from chiasm.data.schema import ImageError, ImageRef
from chiasm.retrieval import Index, Item, contact_sheet, read_pictures
from retrieval.pretend import COLOURS, ColourEncoder, paint


@pytest.mark.parametrize("several", [0, 3])
def test_found_by_text_picture_and_metadata(make: Any, tmp_path: Path, several: int) -> None:
    files = paint(tmp_path / "photos", 24)
    index = make(ColourEncoder(several))
    assert index.search("red") == []
    report = index.add(read_pictures(tmp_path / "photos"), batch_size=5)
    assert len(index) == 24 and report.summary() == "24 added"
    hits = index.search("a picture that is red", k=6)
    assert [hit.metadata["colour"] for hit in hits] == ["red"] * 6
    assert hits[0].path == files[0].resolve() and hits[0].score >= hits[5].score
    first, second = index.search_texts(["blue", "green"], k=3)
    assert {hit.metadata["colour"] for hit in first} == {"blue"} and second[0].metadata["colour"] == "green"
    assert index.search_images([files[5]], k=1)[0][0].id == "005.png"
    alone = index.search_images([files[5], Image.open(files[6])], k=2, exclude_self=True)
    assert alone[0][0].id != "005.png" and len(alone[0]) == len(alone[1]) == 2
    asked = {"colour=blue": 6, "number<4": 4, "colour in red,blue": 12, "colour!=red": 18}
    for where, count in asked.items():
        assert len(index.search("red", k=99, where=where)) == count, where
    assert len(index.search("red", k=99, where=["colour=red", "number>=8"])) == 4


def test_keys_and_values_of_any_letters(make: Any, tmp_path: Path) -> None:
    red = ImageRef.of(paint(tmp_path / "photos", 1)[0])
    metadata = {"Camera Model": 'X "T5"', "f.stop": 4, "색상": "빨강", "year": "2020", "tags": ["a b", 7]}
    index = make(ColourEncoder())
    index.add([Item("a", red, metadata), Item("b", red, {"year": "2021"})])
    asked = ['Camera Model=X "T5"', "f.stop>=4", "f.stop=4", "색상=빨강", 'year="2020"', "year in 2020,x", 'tags="a b"']
    for where in asked:
        assert [hit.id for hit in index.items(where)] == ["a"], where
    assert [hit.id for hit in index.items('tags!="a b"')] == ["b"]


def test_texts_are_no_numbers(tmp_path: Path) -> None:
    red = ImageRef.of(paint(tmp_path / "photos", 1)[0])
    index = Index.create(tmp_path / "index", ColourEncoder())
    index.add([Item("a", red, {"year": "2020"}), Item("b", red, {"year": None})])
    with pytest.raises(
        ValueError, match=r"condition year>=2000 compares numbers, but 'year' is none .* '2020' for one"
    ):
        index.search("red", where="year>=2000")
    index.add([Item("c", red, {"year": 1999})])
    assert index.search("red", where="year>=2000") == []


def test_what_is_there_is_not_looked_at_again(make: Any, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    files = paint(photos, 8)
    encoder = ColourEncoder()
    index = make(encoder)
    index.add(read_pictures(photos))
    before = encoder.looked_at
    assert index.add(read_pictures(photos)).summary() == "0 added, 8 already there"
    assert encoder.looked_at == before
    paint(photos, 2, start=8)
    Image.new("RGB", (16, 16), COLOURS["white"]).save(files[0])
    rows = (photos / "metadata.jsonl").read_text().replace('"number": 5', '"number": 55')
    (photos / "metadata.jsonl").write_text(rows)
    report = index.add(read_pictures(photos))
    assert report.added == ["008.png", "009.png"] and report.replaced == ["000.png", "005.png"]
    assert len(index) == 10
    assert index.search_images([files[5]], k=1)[0][0].metadata["number"] == 55


def test_pictures_are_deleted(make: Any, tmp_path: Path) -> None:
    paint(tmp_path / "photos", 12)
    index = make(ColourEncoder())
    index.add(read_pictures(tmp_path / "photos"))
    assert index.delete(["003.png", "003.png"]) == ["003.png"]
    assert sorted(index.delete(where="colour=red")) == ["000.png", "004.png", "008.png"]
    assert len(index) == 8 and "red" not in {hit.metadata["colour"] for hit in index.search("red", 99)}
    index.compact()
    assert len(list(index.items())) == len(index.search("red", 99)) == 8
    with pytest.raises(ValueError, match=r"holds no picture '003\.png'"):
        index.delete(["003.png"])
    with pytest.raises(ValueError, match="nothing says what to delete"):
        index.delete()
    assert index.add(read_pictures(tmp_path / "photos")).summary() == "4 added, 8 already there"


def test_broken_pictures_stop_or_are_named(make: Any, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    paint(photos, 6)
    (photos / "002.png").write_bytes((photos / "002.png").read_bytes()[:40])
    with (photos / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png"}\n')
    (photos / "link.png").symlink_to("nowhere")
    index = make(ColourEncoder())
    with pytest.raises(ImageError, match=r"002\.png"):
        index.add(read_pictures(photos), batch_size=2)
    assert len(index) == 2
    report = index.add(read_pictures(photos), skip_bad=True)
    assert list(report.bad) == ["002.png", "link.png", "gone.png"] and "no such file" in report.bad["gone.png"]
    assert len(index) == 5 and report.summary() == "3 added, 2 already there, 3 skipped"


def test_one_id_for_two_pictures_is_refused(make: Any, tmp_path: Path) -> None:
    first, second = paint(tmp_path / "photos", 2)
    index = make(ColourEncoder())
    with pytest.raises(ValueError, match="two different pictures have the id 'a'"):
        index.add([Item("a", ImageRef.of(first)), Item("a", ImageRef.of(second))])


def test_one_picture_that_comes_twice_is_taken_once(make: Any, tmp_path: Path) -> None:
    first, second = paint(tmp_path / "photos", 2)
    index = make(ColourEncoder())
    again = [Item("a", ImageRef.of(first), {"n": 1}, ("data", place, 0)) for place in range(2)]
    for reported in ("added", "replaced"):
        other = [Item("a", ImageRef.of(first), {"n": reported})] * 2
        assert getattr(index.add(other), reported) == ["a"] and len(index) == len(list(index.items())) == 1
    with pytest.raises(ValueError, match="picture 'a' comes twice, with different metadata"):
        index.add([Item("a", ImageRef.of(first), {"n": n}) for n in range(2)])
    report = index.add([again[0], Item("b", ImageRef.of(first)), Item("b", ImageRef.of(first)), again[1]])
    assert (report.added, report.replaced, report.unchanged) == (["b"], ["a"], ["b", "a"]) and len(index) == 2
    assert index.add([Item("c", ImageRef.of(second))] * 2, batch_size=1).summary() == "1 added, 1 already there"


def test_another_model_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "photos", 3)
    Index.create(tmp_path / "index", ColourEncoder(), "models/mine").add(read_pictures(tmp_path / "photos"))
    with pytest.raises(ValueError, match="was made by model models/mine with weights"):
        Index.open(tmp_path / "index", ColourEncoder(seed=1))
    index = Index.open(tmp_path / "index")
    with pytest.raises(ValueError, match="opened without a model"):
        index.search("red")
    with pytest.raises(ValueError, match="vectors are 4 wide, the index holds 5"):
        index.search_vectors(torch.ones(1, 4))  # type: ignore[attr-defined]
    assert index.attach(ColourEncoder()).search("red", 1)[0].id == "000.png"
    with pytest.raises(ValueError, match="no picture has the metadata 'color'; there are colour, number"):
        index.search("red", where="color=red")


def test_many_commits_become_one_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.retrieval.adding.COMMIT_ITEMS", 1)
    paint(tmp_path / "photos", 20)
    index = Index.create(tmp_path / "index", ColourEncoder())
    index.add(read_pictures(tmp_path / "photos"), batch_size=1)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert len(manifest["segments"]) == 1 and len(index) == 20


def test_patterns_data_sets_and_what_is_neither(tmp_path: Path) -> None:
    files = paint(tmp_path / "photos", 4)
    (tmp_path / "photos" / "more").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "more" / "x.jpg")
    assert [item.id for item in read_pictures(tmp_path / "photos")][-1] == "more/x.jpg"
    assert [item.id for item in read_pictures(f"{tmp_path}/photos/*.png")] == [file.name for file in files]
    assert [item.id for item in read_pictures(f"{tmp_path}/**/*.jpg")] == ["photos/more/x.jpg"]
    assert next(iter(read_pictures(files[1]))).metadata == {"colour": "green", "number": 1}
    odd = {"file_name": "000.png", "said": "a\u2028b\x85c"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert next(iter(read_pictures(tmp_path / "photos", tmp_path / "odd.jsonl"))).metadata == {"said": odd["said"]}
    (tmp_path / "odd.jsonl").write_bytes(b"\n\xff")
    with pytest.raises(ValueError, match=r"odd\.jsonl, line 2"):
        read_pictures(tmp_path / "photos", tmp_path / "odd.jsonl")
    rows = [{"id": "a", "image": "photos/000.png", "caption": "a red square", "shop": 3}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (item,) = read_pictures(tmp_path / "data.json")
    assert (item.id, item.metadata) == ("a", {"shop": 3, "answer": "a red square"})
    with pytest.raises(ValueError, match="no picture matches"):
        read_pictures(f"{tmp_path}/*.bmp")
    with pytest.raises(ValueError, match="no such file or folder"):
        read_pictures(tmp_path / "nowhere")


def test_a_contact_sheet_shows_what_is_left(tmp_path: Path) -> None:
    files = paint(tmp_path / "photos", 4)
    index = Index.create(tmp_path / "index", ColourEncoder())
    index.add(read_pictures(tmp_path / "photos"))
    files[1].unlink()
    hits = index.search("red", 4)
    sheet = contact_sheet(hits)
    assert sheet.width > sheet.height and sheet.getpixel((120, 120)) == COLOURS["red"]
    with pytest.raises(ValueError, match="nothing was found"):
        contact_sheet([])


def test_a_data_set_that_has_changed_shows_no_other_picture(tmp_path: Path) -> None:
    files, data = paint(tmp_path / "photos", 2), tmp_path / "data.json"
    rows = [{"id": f.stem, "image": base64.b64encode(f.read_bytes()).decode(), "caption": f.stem} for f in files]
    data.write_text(json.dumps(rows))
    index = Index.create(tmp_path / "index", ColourEncoder())
    index.add(read_pictures(data))
    hits = index.search("red", 2)
    assert [hit.image().key() for hit in hits] == [hit.record["key"] for hit in hits]
    for rest in (rows[1:], rows[::-1]):
        data.write_text(json.dumps(rest))
        for hit in hits:
            with pytest.raises(ValueError, match=rf"picture {hit.id} is no longer where it was in {data}"):
                hit.image()
        assert contact_sheet(hits).getpixel((120, 120)) == (217, 217, 217)


def test_a_number_that_is_none_is_no_metadata(make: Any, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    paint(photos, 1)
    (photos / "metadata.jsonl").write_text('{"file_name": "000.png", "year": NaN, "size": -Infinity, "n": 1}\n')
    index = make(ColourEncoder())
    index.add(read_pictures(photos))
    assert index.add(read_pictures(photos)).unchanged == ["000.png"]
    assert next(iter(index.items("n=1"))).metadata == {"year": None, "size": None, "n": 1}
