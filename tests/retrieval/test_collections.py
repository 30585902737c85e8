"""A collection of photographs as people have them: odd names, links, pipes, other formats, turned and large ones."""

import gc
import os
import threading
import unicodedata
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from chiasm.retrieval import Index, read_pictures
from retrieval.pretend import COLOURS, ColourEncoder

NAMES = ("with space.jpg", "고양이.jpg", "new\nline.jpg", "[brackets].jpg", "-dash.jpg", "star*.JPG", "q'\"uote.jpeg")


def save(file: Path, shade: int = 0, size: tuple[int, int] = (16, 16), **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    red, green, blue = COLOURS["red"]
    Image.new("RGB", size, (red - shade, green, blue)).save(file, "JPEG", **options)
    return file


def indexed(folder: Path, photos: Path | str, **options: Any) -> tuple[Index, Any]:
    index = Index.create(folder, ColourEncoder(), "somewhere")
    return index, index.add(read_pictures(photos), **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tmp_path / "photos"


def test_names_are_what_they_are(tmp_path: Path, photos: Path) -> None:
    for number, name in enumerate(NAMES):
        save(photos / "sub folder" / name, number * 3)
    strange = os.fsdecode(b"caf\xe9.jpg")
    save(photos / strange, 60)
    index, report = indexed(tmp_path / "index", photos)
    expected = {strange, *(f"sub folder/{name}" for name in NAMES)}
    assert set(report.added) == expected == {hit.id for hit in Index.open(tmp_path / "index").items()}
    assert {hit.id for hit in index.search_images([photos / strange], k=1)[0]} == {strange}
    index.delete([strange, "sub folder/new\nline.jpg"])
    assert len(index) == len(NAMES) - 1


def test_letters_that_are_taken_apart_are_the_same(tmp_path: Path, photos: Path) -> None:
    """macOS names files with letters in parts, keyboards write them whole."""
    whole, parts = (unicodedata.normalize(form, "고양이.jpg") for form in ("NFC", "NFD"))
    save(photos / parts)
    (photos / "metadata.jsonl").write_text(f'{{"file_name": "{whole}", "colour": "red"}}\n', encoding="utf-8")
    index, report = indexed(tmp_path / "index", photos)
    assert report.summary() == "1 added" and next(iter(index.items())).metadata == {"colour": "red"}
    assert index.delete([whole]) == [parts] and len(index) == 0


def test_links_and_pipes_do_not_trap(tmp_path: Path, photos: Path) -> None:
    save(photos / "a.jpg")
    save(photos / "folder.jpg" / "b.jpg", 9)
    (photos / "loop").symlink_to(photos)
    (photos / "self.jpg").symlink_to(photos / "self.jpg")
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (photos / "link.jpg").symlink_to(save(tmp_path / "elsewhere.jpg", 30))
    os.mkfifo(photos / "pipe.jpg")
    for number, source in enumerate((photos, f"{photos}/**/*.jpg")):
        report = within_a_minute(partial(indexed, tmp_path / f"index{number}", source, skip_bad=True))
        assert sorted(report.added) == ["a.jpg", "folder.jpg/b.jpg", "link.jpg"]
        assert report.bad == {
            "gone.jpg": f"picture {photos}/gone.jpg: no such file",
            "pipe.jpg": f"picture {photos}/pipe.jpg: is a pipe or a device, not a file",
            "self.jpg": f"picture {photos}/self.jpg: cannot be read (Too many levels of symbolic links)",
        }


def within_a_minute(work: Callable[[], tuple[Index, Any]]) -> Any:
    """The report of work that must not wait for ever."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()[1]), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it waits for ever"
    return found[0]


def test_other_formats_are_counted_and_shadows_are_passed_over(photos: Path) -> None:
    save(photos / "a.jfif")
    for name in ("IMG_1.HEIC", "IMG_2.heic", "logo.svg", "._a.jpg", "notes.txt", "movie.mp4"):
        (photos / name).write_bytes(b"something")
    assert read_pictures(photos).left_out == {"heic": 2, "svg": 1} and read_pictures(photos).count == 1
    (photos / "a.jfif").unlink()
    with pytest.raises(ValueError, match=r"holds 2 \.heic, 1 \.svg alone, which Pillow does not read; convert them"):
        read_pictures(photos)
    with pytest.raises(ValueError, match=r"holds 1 \.heic alone"):
        read_pictures(photos / "IMG_1.HEIC")


def test_every_kind_of_pixels_is_read(tmp_path: Path, photos: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    save(photos / "turned.jpg", 5, exif=turned)
    Image.new("CMYK", (16, 16), (10, 200, 200, 10)).save(photos / "cmyk.jpg")
    Image.new("I;16", (16, 16), 60_000).save(photos / "sixteen.png")
    frames = [Image.new("RGB", (16, 16), COLOURS[name]) for name in ("blue", "red", "green")]
    for ending in ("gif", "webp", "tif"):
        frames[0].save(photos / f"moving.{ending}", save_all=True, append_images=frames[1:])
    (photos / "cut.jpg").write_bytes(save(tmp_path / "whole.jpg", size=(300, 200)).read_bytes()[:900])
    (photos / "empty.png").touch()
    index, report = indexed(tmp_path / "index", photos, skip_bad=True)
    assert len(report.added) == 6 and set(report.bad) == {"cut.jpg", "empty.png"}
    assert {hit.id for hit in index.search("blue", k=3)} == {"moving.gif", "moving.webp", "moving.tif"}, "first frames"
    assert {hit.id for hit in index.search("red", k=2)} == {"turned.jpg", "cmyk.jpg"}
    assert index.search("white", k=1)[0].id == "sixteen.png"


def test_a_batch_of_photographs_is_not_held_in_full(tmp_path: Path, photos: Path) -> None:
    for number in range(24):
        save(photos / f"{number}.jpg", number * 3, (200, 100))
    decoded: list[weakref.ref] = []
    alive: list[int] = []

    class Watched(ColourEncoder):
        def prepare(self, image: Image.Image) -> Tensor:
            decoded.append(weakref.ref(image))
            return self.embed_images([image])

        def embed_prepared(self, prepared: Any) -> Tensor:
            gc.collect()
            alive.append(sum(ref() is not None for ref in decoded))
            return ColourEncoder.embed_images(self, [Image.new("RGB", (2, 2))] * len(prepared))

    Index.create(tmp_path / "index", Watched(), "somewhere").add(read_pictures(photos), batch_size=24)
    assert len(decoded) == 24 and alive == [0]


@pytest.mark.parametrize("pattern", ["**", "**/*.jpg", "**.jpg", "*/*.jpg"])
def test_patterns_find_what_a_shell_would(photos: Path, pattern: str) -> None:
    for name in ("a.jpg", "in/b.jpg", ".thumbnails/c.jpg"):
        save(photos / name)
    found = {item.id for item in read_pictures(f"{photos}/{pattern}")}
    assert found == {"**": {"a.jpg", "in/b.jpg"}, "**/*.jpg": {"a.jpg", "in/b.jpg"}, "**.jpg": {"a.jpg"}}.get(
        pattern, {"in/b.jpg"}
    )
