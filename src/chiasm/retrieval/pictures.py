"""Pictures to index: files, a pattern, a folder (with or without `metadata.jsonl`), or a data set."""

import glob
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiasm.data.containers import PICTURES
from chiasm.data.readers import read
from chiasm.data.schema import MAX_PIXELS, ImageRef, SampleError, text_of
from chiasm.retrieval.records import Item

METADATA = "metadata.jsonl"
NAMES = ("file_name", "image", "path")
"""Keys of a row of metadata that may hold the picture's file."""
UNREAD = ("heic", "heif", "jxl", "svg", "dng", "cr2", "cr3", "nef", "arw", "raf", "psd")
"""Endings of pictures that Pillow does not read."""
APPLE_DOUBLE = "._"
"""How names begin that macOS gives to what belongs to a file, and is none, on other systems' disks."""


@dataclass(frozen=True)
class Pictures:
    """Pictures to add, one after the other. `count` is that of the files, or of the samples that show them; `left_out`
    are files that Pillow does not read, by their ending."""

    items: Iterable[Item | SampleError]
    count: int
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Item | SampleError]:
        return iter(self.items)


def read_pictures(source: str | Path, metadata: Path | None = None, max_pixels: int = MAX_PIXELS) -> Pictures:
    """The pictures of a source, none of them opened; a sample of a data set that cannot be read is its error.

    A picture's id is its place in the folder, or its sample's id.

    Args:
        source: a picture, a folder of pictures, a pattern such as `photos/**/*.jpg`, or a data set. Links to folders
            are not followed.
        metadata: JSON lines with `file_name` and anything else; by default `metadata.jsonl` of the folder.
        max_pixels: a larger picture is an error when it is loaded.

    Raises:
        ValueError: there is no picture, or the metadata are not understood.
    """
    path, pattern = Path(source), any(sign in str(source) for sign in "*?[")
    root = _root(path) if pattern and not path.exists() else path if path.is_dir() else path.parent
    found = _files(path, root, pattern)
    files, unread = [file for file in found if _ending(file) in PICTURES], Counter(map(_ending, found))
    left_out = {ending: unread[ending] for ending in UNREAD if unread[ending]}
    if left_out and not files:
        raise ValueError(f"{str(source)!r} holds {in_words(left_out)} alone, which Pillow does not read; convert them")
    if not files:
        if pattern and not path.exists():
            raise ValueError(f"no picture matches {str(source)!r}; endings are {', '.join(PICTURES)}")
        if metadata is not None:
            raise ValueError(f"--metadata goes with picture files; {str(source)!r} is a data set, which has its own")
        limit: dict[str, Any] = {} if max_pixels == MAX_PIXELS else {"max_pixels": max_pixels}
        data = read(source, **limit)
        place = str(Path(source).resolve()) if Path(source).exists() else str(source)
        return Pictures(_samples(data, place), len(data))
    beside = root / METADATA
    there = set(files)
    rows = _as_named(_rows(metadata or (beside if beside.is_file() else None), root), there)
    missing = [file for file in rows if file not in there] if path.is_dir() else []
    shown = {file: ImageRef.of(file, max_pixels=max_pixels) for file in [*files, *missing]}
    items = [
        Item(_name(file, root), image, rows.get(file, {}), by_place=not file.is_symlink())
        for file, image in shown.items()
    ]
    return Pictures(items, len(items), left_out)


def in_words(left_out: Mapping[str, int]) -> str:
    """Files by their ending: "3 .heic, 1 .svg"."""
    return ", ".join(f"{count} .{ending}" for ending, count in left_out.items())


def _files(path: Path, root: Path, pattern: bool) -> list[Path]:
    """Files that are named like pictures, of endings that Pillow reads and of others."""
    if path.is_file():
        return [path] if _is_picture(path) else []
    if not path.is_dir() and not pattern:
        return []
    if path.is_dir():
        return sorted(file for file in path.glob("**/*") if _is_picture(file))
    found = map(Path, glob.glob(str(path), recursive=True))
    return sorted(file for file in found if _is_picture(file) and not _behind_a_link(file, root))


def _behind_a_link(file: Path, root: Path) -> bool:
    return any(folder.is_symlink() for folder in file.parents if folder != root and folder.is_relative_to(root))


def _ending(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def _is_picture(path: Path) -> bool:
    named = _ending(path) in (*PICTURES, *UNREAD) and not path.name.startswith(APPLE_DOUBLE)
    return named and not path.is_dir()


def _root(pattern: Path) -> Path:
    """The folder in front of a pattern's first sign."""
    plain = []
    for part in pattern.parts[:-1]:
        if any(sign in part for sign in "*?["):
            break
        plain.append(part)
    return Path(*plain) if plain else Path()


def _name(file: Path, root: Path) -> str:
    return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()


def _rows(file: Path | None, root: Path) -> dict[Path, dict[str, Any]]:
    if file is None:
        return {}
    rows: dict[Path, dict[str, Any]] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        key = next((key for key in NAMES if isinstance(row, dict) and isinstance(row.get(key), str)), None)
        if key is None:
            raise ValueError(f"{file}, line {number} names no picture, expected an object with {' or '.join(NAMES)}")
        rows[root / row[key]] = {name: value for name, value in row.items() if name != key}
    return rows


def _as_named(rows: dict[Path, dict[str, Any]], there: set[Path]) -> dict[Path, dict[str, Any]]:
    """Rows by the files that are there, where the two take letters apart in another way (macOS does Hangul)."""
    alike = {unicodedata.normalize("NFC", str(file)): file for file in there}
    return {
        file if file in there else alike.get(unicodedata.normalize("NFC", str(file)), file): row
        for file, row in rows.items()
    }


def _samples(data: Sequence[Any], place: str) -> Iterator[Item | SampleError]:
    for index in range(len(data)):
        try:
            sample = data[index]
        except SampleError as error:
            yield error
            continue
        said = [text_of(message["content"]).strip() for message in sample.messages if message["role"] == "assistant"]
        metadata = {"skill": sample.skill, **_plain(sample.meta), "answer": " ".join(said)}
        metadata = {key: value for key, value in metadata.items() if value not in (None, "")}
        for number, image in enumerate(sample.images):
            name = sample.id if len(sample.images) == 1 else f"{sample.id}#{number + 1}"
            yield Item(name, image, metadata, (place, index, number))


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """What conditions can be about: texts, numbers, truth values, and lists of them."""

    def single(value: Any) -> bool:
        return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))

    return {
        key: value
        for key, value in meta.items()
        if single(value) or (isinstance(value, list) and all(map(single, value)))
    }
