"""Folders that are written whole or not at all, wherever they may be."""

import errno
import os
from pathlib import Path

import pytest

from chiasm.sources.writing import model_folder, naming_full_disk, new_folder, whole_file


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


FULL = (OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)"))
"""Python's own, and what the tokenizers library raises."""


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_told_with_its_place(tmp_path: Path, error: Exception) -> None:
    told = r"page\.html is not written: the disk is full \(\d+ MB free\)"
    with pytest.raises(OSError, match=told), naming_full_disk(tmp_path / "page.html"):
        raise error
    with pytest.raises(FileNotFoundError, match="other"), naming_full_disk(tmp_path):
        raise FileNotFoundError("other")


def test_a_small_file_stays_whole_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **_: object) -> int:
        self.write_bytes(text.encode()[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    whole_file(tmp_path / "page.html", "old")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"page\.html is not written: the disk is full"):
        whole_file(tmp_path / "page.html", "newer")
    assert files(tmp_path) == {"page.html": "old"}


def model(folder: Path, text: str, *more: str) -> None:
    for name in ("config.json", "model.safetensors", *more):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", PLACES)
def test_a_model_takes_the_place_of_an_older_one(
    place: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are not the model's stay, weights that no longer are go."""
    monkeypatch.chdir(tmp_path)
    output: Path = place(tmp_path)  # type: ignore[operator]
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    with model_folder(output) as folder:
        model(folder, "old", "words/tokenizer.json", *shards)
        assert not (output / "config.json").exists()
    (output / "notes.txt").write_text("mine")
    with model_folder(output) as folder:
        model(folder, "new", "words/tokenizer.json")
        assert files(output)["config.json"] == "old"
    names = ("config.json", "model.safetensors", "words/tokenizer.json")
    assert files(output) == dict.fromkeys(names, "new") | {"notes.txt": "mine"}
    with pytest.raises(RuntimeError), model_folder(output) as folder:
        model(folder, "half")
        raise RuntimeError
    assert files(output) == dict.fromkeys(names, "new") | {"notes.txt": "mine"}
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file; name a folder"):
        model_folder(output / "notes.txt").__enter__()


@pytest.mark.parametrize("dies_at", range(4))
def test_a_kill_while_files_change_places_leaves_nothing_that_loads_by_halves(
    dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path, "old", "tokenizer.json")
    moved, move = [], Path.replace

    def dying(self: Path, target: Path) -> Path:
        if len(moved) == dies_at:
            raise KeyboardInterrupt
        moved.append(target)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    try:
        with model_folder(tmp_path) as folder:
            model(folder, "new", "tokenizer.json")
    except KeyboardInterrupt:
        assert not (tmp_path / "config.json").exists()
        kept = [path for path, text in files(tmp_path).items() if text == "new"]
        assert sorted(Path(path).name for path in kept) == ["config.json", "model.safetensors", "tokenizer.json"]
    else:
        assert set(files(tmp_path).values()) == {"new"}


def test_two_processes_may_write_one_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, replace, others = tmp_path / "page.html", Path.replace, iter([101, 102])

    def meanwhile(self: Path, target: Path) -> Path:
        if (other := next(others, None)) is not None:
            monkeypatch.setattr("os.getpid", lambda: other)
            whole_file(page, f"by {other}")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    whole_file(page, "by the first")
    assert page.read_text() == "by the first" and list(tmp_path.iterdir()) == [page]
