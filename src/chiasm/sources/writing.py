"""Folders that are written whole or not at all, and a full disk that is told with its place."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chiasm.sources.errors import is_full_disk

UNFINISHED = ".partial-"
"""Begins the name of a folder that is being written."""

CONFIG = "config.json"
"""Without this file a folder is no model: it goes first and comes last."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
BESIDE = (
    *("added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt", "preprocessor_config.json"),
    *("processor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("spiece.model", "vocab.json", "vocab.txt"),
)
"""Files of a processor: one that is written anew must find none of an older one."""


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
def model_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write a model into, which is in `output` when it is whole and on disk.

    Where `output` is a folder with files, a model among them or not, those of the new one then take their places one by
    one, and other files stay. What a kill leaves there is the old model, or the new one, or none that would load.

    Raises:
        OSError: `output` is a file, cannot be written, or the disk is full.
    """
    target = Path(output).resolve()
    if target.is_dir() and target.name.startswith(UNFINISHED):  # it appears as a whole with what else is written there
        yield target
        return
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{output} is a file; name a folder to save the model in")
    with naming_full_disk(target), _beside(target) if target.is_dir() else appearing(target) as place:
        yield place


def save_whole(folder: str | Path, model: Any, processor: Any, card: Callable[[Path], object], **kwargs: Any) -> None:
    """`save_pretrained` of a model and its processor, if it has one, and what `card` writes: all or nothing."""
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", Path(folder).resolve().name)
    with model_folder(folder) as place:
        model.save_pretrained(place, **kwargs)
        if processor is not None:
            processor.save_pretrained(place)
        card(place)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder within `target`, whose files move up when they are all on disk. What stops on the way up is kept."""
    place = unfinished(target / "model")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
        _flush_all(place)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    _take_places(place, target)
    shutil.rmtree(place, ignore_errors=True)
    _flush(target)


def _take_places(place: Path, target: Path) -> None:
    (target / CONFIG).unlink(missing_ok=True)
    written = [path.relative_to(place) for path in sorted(place.rglob("*")) if path.is_file()]
    for path in target.iterdir():
        known = WEIGHTS.fullmatch(path.name) or (Path("tokenizer_config.json") in written and path.name in BESIDE)
        if known and Path(path.name) not in written:
            path.unlink()
    for name in sorted(written, key=lambda name: name == Path(CONFIG)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).replace(target / name)


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
        _flush_all(place)
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
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise OSError(f"{path} is not written: {why(error, path)}") from error


def whole_file(path: Path, text: str) -> None:
    """Writes a small file at once; of several processes that do so, one after the other.

    Raises:
        OSError: it cannot be written, or the disk is full; an older one is as it was.
    """
    place = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming_full_disk(path):
        try:
            place.write_text(text, encoding="utf-8")
            place.replace(path)
        except OSError:
            place.unlink(missing_ok=True)
            raise


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


def _flush_all(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
