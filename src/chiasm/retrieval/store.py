"""The folder of an index: immutable segments, and a manifest that is replaced in one step and names what counts.

    manifest.json            format, model, shape of a row, and every segment's files with their sizes and sha256
    segments/000001.f32      rows of K × D float32 numbers, little-endian
    segments/000001.jsonl    one record a row
    segments/000001.gone-7   rows that were deleted, a JSON list
    faiss.index              of an approximate search; made again where it is not there or not whole
    lock                     held by the one process that writes

A file is complete and on disk before a manifest names it, and no file changes after that. So a process that is killed
leaves either the old state or the new one; what it wrote for a state that never came is removed by the next writer.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

MANIFEST = "manifest.json"
FORMAT = 1
FLOAT = np.dtype("<f4")
RETRIES = 5
UNFINISHED = ".new"
STARTED = ("lock", "segments", f"{MANIFEST}{UNFINISHED}")
"""What is in an index whose making was stopped."""


class Records(Sequence[dict[str, Any]]):
    """Records of all segments, kept as the files' bytes and parsed when they are asked for."""

    def __init__(self) -> None:
        self.blobs: list[bytes] = []
        self.ends: list[np.ndarray] = []
        self.starts = [0]

    def extend(self, blob: bytes) -> None:
        """One more segment's lines."""
        self.blobs.append(blob)
        self.ends.append(np.flatnonzero(np.frombuffer(blob, np.uint8) == ord("\n")))
        self.starts.append(len(self) + len(self.ends[-1]))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        row = range(len(self))[row]
        segment = bisect_right(self.starts, row) - 1
        place, ends = row - self.starts[segment], self.ends[segment]
        return json.loads(self.blobs[segment][ends[place - 1] + 1 if place else 0 : ends[place]])


class Snapshot:
    """One state of an index: its rows and records do not change, whatever is written meanwhile."""

    def __init__(self, folder: Path, manifest: dict[str, Any], verify: bool) -> None:
        self.manifest = manifest
        self.shape: tuple[int, int] = tuple(manifest["shape"] or (1, 0))
        self.records = Records()
        self.parts: list[np.ndarray] = []
        gone: list[int] = []
        for segment in manifest["segments"]:
            base = len(self.records)
            files = {kind: folder / "segments" / entry["name"] for kind, entry in segment["files"].items()}
            for kind, path in files.items():
                _check(path, segment["files"][kind], verify)
            rows = np.memmap(files["vectors"], FLOAT, "c", shape=(segment["items"], *self.shape))
            self.records.extend(files["records"].read_bytes())
            self.parts.append(np.asarray(rows))
            if "gone" in files:
                gone += [base + row for row in json.loads(files["gone"].read_text())]
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.live = np.ones(len(self.records), dtype=bool)
        self.live[gone] = False

    def __len__(self) -> int:
        """Rows, deleted ones included."""
        return len(self.records)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copies of rows, (rows, K, D)."""
        if len(self.parts) == 1:
            return self.parts[0][rows]
        found = np.empty((len(rows), *self.shape), FLOAT)
        segment = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(segment):
            here = segment == number
            found[here] = self.parts[number][rows[here] - self.starts[number]]
        return found


class Store:
    """Reads and writes the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, model: dict[str, Any]) -> "Store":
        """A new index in a folder that is empty or not there yet."""
        started = {folder / name for name in STARTED}
        if folder.exists() and (not folder.is_dir() or any(path not in started for path in folder.rglob("*"))):
            raise FileExistsError(f"{folder} exists and is not empty; choose another folder, or add to the index in it")
        (folder / "segments").mkdir(parents=True, exist_ok=True)
        store = cls(folder)
        store._commit({"format": FORMAT, "version": 0, "model": model, "shape": None, "segments": []})
        return store

    def manifest(self) -> dict[str, Any]:
        """The present state."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self.folder} holds no index; make one with chiasm index MODEL IMAGES") from None
        except ValueError as error:
            raise ValueError(f"{self.folder / MANIFEST} is damaged ({error}); index the pictures again") from error
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise ValueError(f"{self.folder} has the index format {found!r}, expected {FORMAT}; index again")
        return manifest

    def snapshot(self, verify: bool = True) -> Snapshot:
        """The present state with its rows; a compaction in between is followed.

        Raises:
            ValueError: a file is missing, cut or changed. `verify` reads all of it and compares its sha256 too.
        """
        for _ in range(RETRIES):
            manifest = self.manifest()
            try:
                return Snapshot(self.folder, manifest, verify)
            except FileNotFoundError as error:
                missing = error
                if self.manifest()["version"] == manifest["version"]:
                    break
        raise ValueError(f"{self.folder} lost the file {missing.filename}; index the pictures again")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the lock; files that no manifest names are removed first."""
        try:
            held = FileLock(self.folder / "lock").acquire(timeout=1)
        except Timeout:
            raise BlockingIOError(f"another process is writing to {self.folder}; wait until it is done") from None
        with held:
            self._sweep()
            yield

    def append(self, records: Sequence[dict[str, Any]], vectors: np.ndarray, gone: Iterable[int] = ()) -> None:
        """Rows and what they replace, in one step: on disk when this returns.

        Args:
            gone: rows of the present state that are deleted in the same step.
        """
        manifest = self._with_gone(gone)
        shape = list(vectors.shape[1:])
        if manifest["shape"] not in (None, shape):
            raise ValueError(f"vectors are {shape} a picture, the index holds {manifest['shape']}")
        manifest["shape"] = shape
        manifest["segments"] = [*manifest["segments"], self._segment(manifest, [(records, vectors)])]
        self._commit(manifest)

    def delete(self, gone: Iterable[int]) -> None:
        """Marks rows of the present state as deleted."""
        self._commit(self._with_gone(gone))

    def compact(self) -> None:
        """Rewrites what is live as one segment."""
        state, manifest = self.snapshot(), self.manifest()
        pieces = (
            ([state.records[row] for row in range(start, end) if state.live[row]], part[state.live[start:end]])
            for part, start, end in zip(state.parts, state.starts, state.starts[1:], strict=False)
        )
        manifest["segments"] = [self._segment(manifest, pieces)] if state.live.any() else []
        self._commit(manifest)
        self._sweep()

    def keep(self, name: str, said: bytes, body: np.ndarray) -> None:
        """A file beside the segments, which can be made again: whole and on disk, or as it was.

        Args:
            said: one line about the body.
            body: bytes.
        """
        temporary = self.folder / f"{name}.{os.getpid()}{UNFINISHED}"
        try:
            writer = _Writer(temporary)
            for part in (_digest(said, body) + b"\n", said, body.data):
                writer.write(part)
            writer.close()
            os.replace(temporary, self.folder / name)
            _sync(self.folder)
        finally:
            temporary.unlink(missing_ok=True)

    def kept(self, name: str) -> tuple[bytes, np.ndarray] | None:
        """The line and the body of a kept file; None where there is none, or it is not what was written."""
        try:
            with (self.folder / name).open("rb") as file:
                digest, said = file.readline(), file.readline()
                body = np.fromfile(file, np.uint8)
        except OSError:
            return None
        return (said, body) if digest == _digest(said, body) + b"\n" else None

    def _segment(
        self, manifest: dict[str, Any], pieces: Iterable[tuple[Sequence[dict[str, Any]], np.ndarray]]
    ) -> dict[str, Any]:
        name = f"{manifest['version'] + 1:06}"
        vectors, records = (_Writer(self.folder / "segments" / f"{name}.{kind}") for kind in ("f32", "jsonl"))
        items = 0
        for rows, numbers in pieces:
            vectors.write(np.ascontiguousarray(numbers, FLOAT).data)
            records.write("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode())
            items += len(rows)
        return {"items": items, "files": {"vectors": vectors.close(), "records": records.close()}}

    def _with_gone(self, gone: Iterable[int]) -> dict[str, Any]:
        manifest, rows, start = self.manifest(), np.unique(np.fromiter(gone, np.int64)), 0
        for number, segment in enumerate(manifest["segments"]):
            here = rows[(rows >= start) & (rows < start + segment["items"])] - start
            start += segment["items"]
            if not len(here):
                continue
            before = segment["files"].get("gone")
            old = json.loads((self.folder / "segments" / before["name"]).read_text()) if before else []
            stem = segment["files"]["vectors"]["name"].partition(".")[0]
            writer = _Writer(self.folder / "segments" / f"{stem}.gone-{manifest['version'] + 1}")
            writer.write(json.dumps(sorted({*old, *here.tolist()})).encode())
            manifest["segments"][number] = segment | {"files": segment["files"] | {"gone": writer.close()}}
        return manifest

    def _commit(self, manifest: dict[str, Any]) -> None:
        """From here on the manifest counts."""
        _sync(self.folder / "segments")
        manifest["version"] += 1
        temporary = self.folder / f"{MANIFEST}{UNFINISHED}"
        writer = _Writer(temporary)
        writer.write(json.dumps(manifest, indent=1).encode())
        writer.close()
        os.replace(temporary, self.folder / MANIFEST)
        _sync(self.folder)

    def _sweep(self) -> None:
        named = {entry["name"] for segment in self.manifest()["segments"] for entry in segment["files"].values()}
        for path in (self.folder / "segments").iterdir():
            if path.name not in named:
                path.unlink()
        for path in self.folder.glob(f"*{UNFINISHED}"):
            path.unlink(missing_ok=True)


class _Writer:
    """A file that is hashed while it is written, and on disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.digest, self.size = path, path.open("wb"), hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += memoryview(data).nbytes

    def close(self) -> dict[str, Any]:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"name": self.path.name, "bytes": self.size, "sha256": self.digest.hexdigest()}


def _digest(said: bytes, body: np.ndarray) -> bytes:
    digest = hashlib.sha256(said)
    digest.update(body.data)
    return digest.hexdigest().encode()


def _check(path: Path, entry: dict[str, Any], verify: bool) -> None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{path} has {size:,} bytes, expected {entry['bytes']:,}; index the pictures again")
    if verify:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(f"{path} is damaged: its sha256 is not the one it was written with; index again")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
