"""What a cell reads from this machine's disk, in short: a comparison that goes on must go on with the same."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from chiasm.comparison.choices import Choice
from chiasm.comparison.schema import Plan
from chiasm.data.containers import mixture_entries

INPUTS = "inputs.json"
"""In a cell's folder, what it was begun with."""

TOLD = {".json", ".jsonl", ".yaml", ".yml", ".jinja", ".txt", ".csv", ".parquet", ".arrow", ".tar", ".safetensors"}
"""Kinds of files of a folder whose content counts; of others, such as pictures, the name and the size do."""

FEW = 64
"""So many of them are noted one by one, so that the one that changes can be named."""

WHOLE, BLOCKS = 1 << 26, 64
"""Bytes up to which a file is read whole; of a larger one, so many blocks of 1 MiB are, evenly spread."""


def inputs_of(plan: Plan, choice: Choice, output: Path) -> dict[str, str]:
    """Every data file, and the files of every folder of data or of a model, with a digest of each.

    Pictures that a data file names elsewhere are not among them, nor is what has a name instead of a path.

    Args:
        output: the comparison's folder, which may lie in one of them.
    """
    base, data = plan.base, plan.data
    train = data.train if choice.train is None else choice.train
    sources: list[Any] = [data.captions, train, data.validation, data.test, data.test_captions]
    sources += [data.train] if plan.evaluation.shots else []
    named = [source.get("path") if isinstance(source, dict) else source for source in sources]
    named += [base.decoder] if choice.fusion == "unified" else [base.vision]
    named += [base.text if choice.fusion == "late" else base.language]
    found: dict[Path, None] = {}
    for name in named:
        if name is not None:
            _collect(Path(str(name)).expanduser(), found)
    return {name: digest for path in found for name, digest in _digests(path, output.resolve()).items()}


def require_same(folder: Path, then: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Refuses to go on in a cell's folder with other data.

    Args:
        then: what the cell was begun with; None where an older version noted nothing.
    """
    changed = [] if then is None else [path for path in [*now, *then] if then.get(path) != now.get(path)]
    if changed:
        raise ValueError(
            f"{changed[0]} has changed since {folder} was begun; put it back, choose another folder with -o, or remove "
            "that one"
        )


def _digests(path: Path, output: Path) -> dict[str, str]:
    """Of a file, its content; of a folder, its texts and weights, and the names and sizes of all files."""
    if path.is_file():
        return {str(path): _digest(path)}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.resolve().is_relative_to(output)]
    told = {str(file): _digest(file) for file in files if file.suffix in TOLD}
    rest = [[str(file.relative_to(path)), file.stat().st_size] for file in files if str(file) not in told]
    if len(told) > FEW:
        return {str(path): _short(json.dumps([told, rest]).encode())}
    return told | ({str(path): _short(json.dumps(rest).encode())} if rest else {})


def _digest(file: Path) -> str:
    status = file.stat()
    return _content(file, status.st_size, status.st_mtime_ns)


@cache
def _content(path: Path, size: int, changed: int) -> str:
    """By its time, so that a file is read once for all cells."""
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            found.update(file.read())
        else:
            for block in range(BLOCKS):
                file.seek(block * (size - (1 << 20)) // (BLOCKS - 1))
                found.update(file.read(1 << 20))
    return found.hexdigest()[:16]


def _collect(path: Path, found: dict[Path, None]) -> None:
    """Adds the file or folder, where there is one, and what a mixture takes together."""
    if path in found or not path.exists():
        return
    found[path] = None
    for entry in mixture_entries(path) or []:
        _collect(path.parent / str(entry["path"]), found)


def _short(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
