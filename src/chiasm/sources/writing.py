"""Folders that are written whole or not at all, and a full disk that is told with its place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from chiasm.sources.errors import is_full_disk

UNFINISHED = ".partial-"
"""Begins the name of a folder that is being written."""


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write into. Where `output` is an empty folder, it is this one; else one that appears as `output` when
    it is whole. After an error nothing is in it.

    Raises:
        OSError: `output` is there already and not empty, cannot be written, or the disk is full.
    """
    refuse_to_overwrite(output)
    place = Path(output).resolve()
    with naming_full_disk(place), _filled(place) if place.is_dir() else appearing(place) as folder:
        yield folder


def refuse_to_overwrite(folder: str | Path) -> None:
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder with -o")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write into that appears as `target`, complete and on disk, or not at all."""
    place = unfinished(target)
    shutil.rmtree(place, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.mkdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        yield place
        for path in [*(p for p in place.rglob("*") if p.is_file()), place]:
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        place.rename(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def unfinished(target: Path) -> Path:
    """Where a folder is while it is being written."""
    return target.parent / f"{UNFINISHED}{target.name}"


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Names the place where the disk is full, which the error itself often does not."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        raise OSError(f"{path} is not written: {why(error, path)}") from error


def why(error: Exception, path: Path) -> str:
    """The reason for which a path is not written, in one line."""
    if not is_full_disk(error):
        return " ".join(str(error).split())
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    return f"the disk is full ({free / 1e6:.0f} MB free); make room and run the same command again"


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which is empty again after an error."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written; choose another folder with -o")
    try:
        yield folder
    except BaseException:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
