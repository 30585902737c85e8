"""The cache: one folder per alias, complete or absent.

A folder is built beside its place and renamed into it. The last file to be written is the marker, which names what the
folder was made from and the size and hash of every file: a folder whose files differ in size from it never loads.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "chiasm-source.json"
FSYNC_FROM = 1_000_000


def cache_folder() -> Path:
    """`CHIASM_CACHE`, or `~/.cache/chiasm`."""
    return Path(os.environ.get("CHIASM_CACHE") or "~/.cache/chiasm").expanduser()


def free_space() -> int:
    """Bytes that are free where the cache is, or will be."""
    folder = cache_folder().absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def is_ready(folder: Path, made_from: str) -> bool:
    """Whether the folder is complete and of this origin; compares sizes, not contents."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        return marker["made_from"] == made_from and all(
            (folder / name).stat().st_size == entry["size"] for name, entry in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, gone afterwards whatever happens; so are those of builds that were killed.

    The caller holds the lock of `folder`, so no other process builds it now.
    """
    prefix = f".{folder.name}.building-"
    for abandoned in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(built: Path, folder: Path, made_from: str) -> None:
    """Marks a built folder as complete and moves it to its place, where it replaces a torn or outdated one."""
    files = sorted(path for path in built.rglob("*") if path.is_file())
    marker = {"made_from": made_from, "files": {path.relative_to(built).as_posix(): _entry(path) for path in files}}
    with open(built / MARKER, "w", encoding="utf-8") as file:
        json.dump(marker, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if folder.exists():
        os.replace(folder, built.with_name("replaced"))
    os.replace(built, folder)


def _entry(path: Path) -> dict[str, int | str]:
    path.chmod(0o644)  # safetensors are written for the owner alone
    with open(path, "rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        if size >= FSYNC_FROM:
            os.fsync(file.fileno())
    return {"size": size, "sha256": digest}
