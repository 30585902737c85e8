"""What holds rows: JSON and JSONL files, Hugging Face datasets, WebDataset tars. Rows are read one at a time."""

import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from chiasm.data.schema import DAMAGED_SHARD, ByteRange, ImageRef, Problem, SampleError
from chiasm.data.splits import SPLITS

SAVED_DATASET = ("dataset_dict.json", "dataset_info.json", "state.json")
PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")


class Unsplit(ValueError):
    """Data that comes in splits, of which one must be named."""

    def __init__(self, name: str, splits: Iterable[str], split: str | None) -> None:
        asked = "none was asked for" if split is None else f"{split!r} is not one of them"
        fix = "name one of them, as split= or --split, or beside its path in a YAML mixture"
        super().__init__(f"{name} has the splits {', '.join(splits)}, and {asked}: {fix}")


class Rows(ABC):
    """Rows by index. `folder` is where their pictures' names start, `name` begins the id of a row without one."""

    folder: Path
    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> dict[str, Any]:
        """One row. SampleError if it cannot be read."""


class JsonRows(Rows):
    """The objects of a JSON list or of JSON lines, kept as the file's bytes and parsed one at a time.

    One block of bytes instead of millions of Python objects: worker processes share it, and it is small to send.
    """

    def __init__(self, file: Path, name: str | None = None) -> None:
        self.file, self.folder, self.name = file, file.parent, name or file.stem
        self.blob = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        spans = list(_list_spans(self.blob, file) if self.blob.lstrip()[:1] == b"[" else _line_spans(self.blob, file))
        if not spans:
            raise ValueError(f"{file} has no samples in it")
        self.spans = np.array(spans, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.spans)

    def row(self, index: int) -> dict[str, Any]:
        start, end = self.spans[index]
        try:
            row = json.loads(self.blob[start:end].decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            line = self.blob.count(b"\n", 0, int(start)) + 1
            raise SampleError(f"{self.name}:{index}", [_unreadable(f"{self.file}, line {line}: {error}")]) from error
        if not isinstance(row, dict):
            found = f"{self.file}, item {index}: expected an object, not {row!r:.60}"
            raise SampleError(f"{self.name}:{index}", [_unreadable(found)])
        return row


class DatasetRows(Rows):
    """A `datasets.Dataset`: rows come as Arrow has them, so no picture is decoded."""

    def __init__(self, dataset: Any, name: str, folder: Path) -> None:
        self.dataset, self.name, self.folder = dataset.with_format("arrow"), name, folder

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> dict[str, Any]:
        return self.dataset[index].to_pylist()[0]


class TarRows(Rows):
    """WebDataset shards: the files of one base name are a row: `json` gives keys, `txt` a caption, the rest images.

    Of a shard that is cut off or damaged the row that stands there cannot be read, and those behind it are not seen.
    """

    def __init__(self, tars: list[Path]) -> None:
        self.folder, self.name = tars[0].parent, tars[0].stem
        self.groups: list[tuple[tuple[Path, str], dict[str, ByteRange]]] = []
        self.damage: dict[int, str] = {}
        for tar in tars:
            groups: dict[tuple[Path, str], dict[str, ByteRange]] = {}
            members, damage = _scan_tar(tar)
            for stem, ending, place in members:
                groups.setdefault((tar, stem), {})[ending] = place
            self.groups += groups.items()
            if damage is not None:
                self.groups += [((tar, ""), {})] if not groups else []
                self.damage[len(self.groups) - 1] = damage
        if len(self.damage) == len(self.groups):
            raise ValueError("; ".join(self.damage.values()) or f"{tars[0]} holds no samples")

    def __len__(self) -> int:
        return len(self.groups)

    def row(self, index: int) -> dict[str, Any]:
        (tar, stem), members = self.groups[index]
        if index in self.damage:
            raise SampleError(tar.name, [Problem(DAMAGED_SHARD, self.damage[index])])
        row: dict[str, Any] = {"id": stem}
        for ending, place in sorted(members.items()):
            try:
                if ending == "json":
                    row |= dict(json.loads(place.read()).items())
                elif ending in ("txt", "caption"):
                    row["caption"] = place.read().decode("utf-8").strip()
            except (ValueError, AttributeError) as error:
                raise SampleError(stem, [_unreadable(f"{tar}, member {stem}.{ending}: {error}")]) from error
        pictures = sorted(ending for ending in members if ending.rpartition(".")[2] in PICTURES)
        row["images"] = [ImageRef.of(members[ending], f"{tar}, member {stem}.{ending}") for ending in pictures]
        row.pop("image", None)
        return row


def open_source(source: Any, split: str | None, understood: str) -> tuple[Rows, str | None]:
    """The rows of a path or a Hugging Face dataset, told by content, and the split that is still to be made.

    That split is None where the data came with it. ValueError with `understood` if nothing is recognised.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        hub_name, _, config = source.removeprefix("hf:").partition(":")
        return _dataset_rows(_datasets().load_dataset(hub_name, config or None), split, hub_name, Path())
    if not isinstance(source, str | Path):
        if type(source).__module__.split(".")[0] != "datasets":
            raise ValueError(f"data of type {type(source).__name__} is not understood; understood are {understood}")
        return _dataset_rows(source, split, "data", Path())
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data {str(path)!r}: no such file or folder; understood are {understood}")
    if path.is_dir():
        return _open_folder(path, split, understood)
    with path.open("rb") as file:
        head = file.read(4096)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        return JsonRows(path), split
    if head[:4] == b"PAR1":
        return _dataset_rows(_datasets().Dataset.from_parquet(str(path)), split, path.stem, path.parent)
    if head[257:262] == b"ustar":
        return TarRows([path]), split
    raise ValueError(f"data {str(path)!r} is {_looks_like(head)}; understood are {understood}")


def _open_folder(path: Path, split: str | None, understood: str) -> tuple[Rows, str | None]:
    if any((path / name).is_file() for name in SAVED_DATASET):
        return _dataset_rows(_datasets().load_from_disk(str(path)), split, path.name, path)
    if (path / "metadata.jsonl").is_file():
        return JsonRows(path / "metadata.jsonl", name=path.name), split
    tars = sorted(path.glob("*.tar"))
    if tars:
        return TarRows(tars), split
    if split is not None and (path / split).is_dir():
        return _open_folder(path / split, None, understood)
    files = sorted(file for ending in ("json", "jsonl", "parquet") for file in path.glob(f"*.{ending}"))
    if len(files) == 1:
        return open_source(files[0], split, understood)
    if not files and (splits := [name for name in SPLITS if (path / name).is_dir()]):
        raise Unsplit(f"folder {str(path)!r}", splits, split)
    found = ", ".join(file.name for file in files) or "no data file"
    raise ValueError(
        f"folder {str(path)!r} holds {found}, so it is not clear what to read; understood are {understood}"
    )


def _dataset_rows(data: Any, split: str | None, name: str, folder: Path) -> tuple[Rows, str | None]:
    datasets = _datasets()
    if isinstance(data, datasets.DatasetDict):
        if len(data) == 1:
            data = next(iter(data.values()))
        elif split in data:
            data, split = data[split], None
        else:
            raise Unsplit(name, data, split)
    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"a {type(data).__name__} cannot be read by index: load it without streaming")
    return DatasetRows(data, name, folder), split


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError("this data needs the package datasets: pip install 'chiasm[data]'") from None
    return datasets


def mixture_entries(path: Path) -> list[dict] | None:
    """The entries of a YAML mixture, or None if the file is something else."""
    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        return None
    try:
        entries = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) and "path" in e for e in entries):
        raise ValueError(
            f"{path}: a mixture is a list of entries with a path and a weight, like '- {{path: a.json, weight: 2}}'"
        )
    return entries


def _list_spans(blob: bytes, file: Path) -> Iterator[tuple[int, int]]:
    """Byte spans of the items of a JSON list; an error names the file and the line."""
    try:
        text = blob.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
    decoder, ascii_only = json.JSONDecoder(), text.isascii()
    place = _skip_space(text, text.index("[") + 1)
    last_place, last_byte = 0, 0
    while text[place : place + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            hint = " (the file ends here)" if text[place : place + 1] == "" else ""
            raise ValueError(
                f"{file}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}{hint}"
            ) from error
        start_byte = last_byte + place - last_place  # only spaces and a comma lie between two items
        end_byte = start_byte + (end - place if ascii_only else len(text[place:end].encode()))
        yield start_byte, end_byte
        last_place, last_byte = end, end_byte
        place = _skip_space(text, end)
        mark = text[place : place + 1]
        if mark == ",":
            place = _skip_space(text, place + 1)
        if mark not in (",", "]") or (mark == "," and text[place : place + 1] == "]"):
            found = (
                "a comma before the closing bracket"
                if mark == ","
                else "the end of the file"
                if not mark
                else repr(mark)
            )
            line = text.count("\n", 0, place) + 1
            raise ValueError(f"{file}, line {line}: not valid JSON: {found} after an item, expected a comma or ]")


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\n", "\r", "\t"):
        place += 1
    return place


def _line_spans(blob: bytes, file: Path) -> Iterator[tuple[int, int]]:
    """Byte spans of the lines that are not blank; an error if the file is one JSON object over many lines."""
    start = 0
    while start < len(blob):
        end = blob.find(b"\n", start)
        end = len(blob) if end < 0 else end
        if start == 0 and blob[:end].strip() == b"{":
            raise ValueError(f"{file} is one JSON object: expected a list of samples, or one sample per line")
        if blob[start:end].strip():
            yield start, end
        start = end + 1


def _scan_tar(tar: Path) -> tuple[list[tuple[str, str, ByteRange]], str | None]:
    """(base name, ending, place) of the files in an uncompressed tar, and what is wrong with it if anything is."""
    found: list[tuple[str, str, ByteRange]] = []
    end = 0
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                end = member.offset
                if member.isfile():
                    folder, _, file = _as_text(member.name).rpartition("/")
                    stem, _, ending = file.partition(".")
                    place = ByteRange(tar, member.offset_data, member.size)
                    found.append((f"{folder}/{stem}".lstrip("/"), ending.lower(), place))
            end = members.offset
    except tarfile.TarError as error:
        return found, _damaged(tar, end, str(error))
    mark = ByteRange(tar, end, tarfile.BLOCKSIZE).read()  # tarfile takes a bad header for the end
    if mark == bytes(tarfile.BLOCKSIZE):
        return found, None
    return found, _damaged(tar, end, "a header is damaged" if len(mark) == tarfile.BLOCKSIZE else "its end is missing")


def _as_text(name: str) -> str:
    """A member's name; bytes that are no UTF-8, as of tars from older systems, are written out."""
    return name.encode(errors="backslashreplace").decode()


def _damaged(tar: Path, place: int, reason: str) -> str:
    return (
        f"shard {tar} is cut off or damaged at byte {place:,} of {tar.stat().st_size:,} ({reason}), and what stands "
        "there and behind it is lost: fetch it again; shards must be whole, uncompressed tars"
    )


def _unreadable(reason: str) -> Problem:
    return Problem("unreadable row", reason)


def _looks_like(head: bytes) -> str:
    if not head:
        return "an empty file"
    return (
        "a compressed file: unpack it first"
        if head[:2] in (b"\x1f\x8b", b"PK")
        else "in a format that is not understood"
    )
