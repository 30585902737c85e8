"""Folders that are written whole or not at all, wherever they may be."""

import errno
import os
from pathlib import Path

import pytest

from chiasm.sources.writing import naming_full_disk, new_folder


def empty(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


def linked(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(empty(tmp_path))
    return tmp_path / "link"


def dangling(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path / "there")
    return tmp_path / "link"


def current(tmp_path: Path) -> Path:
    os.chdir(empty(tmp_path))
    return Path()


def absent(tmp_path: Path) -> Path:
    return tmp_path / "new" / "there"


PLACES = (empty, linked, dangling, current, absent)


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_is_written_wherever_there_is_nothing(
    place: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output: Path = place(tmp_path)  # type: ignore[operator]
    with new_folder(output) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("whole")
    assert (output / "inner" / "file").read_text() == "whole"
    assert not list(tmp_path.rglob(".partial-*"))
    with pytest.raises(FileExistsError, match="is not empty"), new_folder(output):
        pass


@pytest.mark.parametrize("place", PLACES)
def test_after_an_error_nothing_is_left(place: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output: Path = place(tmp_path)  # type: ignore[operator]
    with pytest.raises(FileNotFoundError, match=r"words\.txt"), new_folder(output) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("half")
        (folder / "file").write_text("half")
        raise FileNotFoundError(errno.ENOENT, "No such file", "words.txt")
    assert not output.exists() or list(output.iterdir()) == []
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_parent_that_cannot_be_written_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        if self.name.startswith(".partial-"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path}/one'"), new_folder(tmp_path / "one"):
        pytest.fail("the body was entered")


def test_a_full_disk_is_told_with_its_place(tmp_path: Path) -> None:
    told = r"page\.html is not written: the disk is full \(\d+ MB free\)"
    with pytest.raises(OSError, match=told), naming_full_disk(tmp_path / "page.html"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="other"), naming_full_disk(tmp_path):
        raise FileNotFoundError("other")
