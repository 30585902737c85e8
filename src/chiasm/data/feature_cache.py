"""Patch features of a frozen encoder on disk: each distinct picture is encoded once, in all stages, runs and processes.

A cache is one folder for one encoder, preprocessing and precision. `features.bin` holds rows of N × D_v numbers;
`keys.bin` holds the sha256 of the picture behind each row, in the same order. Rows are flushed to disk before their
keys, so a process that is killed leaves nothing that could be mistaken for features; what it left is written over.

The folders live in `~/.cache/chiasm/features` (or under `CHIASM_CACHE`). When a cache is opened, those that were not
used for the longest time are removed until the others take at most `CHIASM_FEATURE_CACHE_GB` (50) gigabytes; one that
was used within a day is never removed.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.sources.cache import cache_folder
from chiasm.sources.writing import naming_full_disk

KEY_BYTES = 32
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LIMIT, DEFAULT_LIMIT_GB = "CHIASM_FEATURE_CACHE_GB", 50.0
PROTECTED_SECONDS = 24 * 3600.0


def encoder_identity(
    encoder: nn.Module, features: dict[str, Any], preprocessing: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Everything that a picture's features depend on, as plain values.

    Args:
        encoder: its weights and buffers are hashed.
        features: which layers are read (`VisionFeatures.to_dict`).
        preprocessing: the image processor's settings.
        dtype: a key of `DTYPES`, the precision of the encoder's arithmetic and of the rows.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return {"weights": digest.hexdigest(), "features": features, "preprocessing": preprocessing, "dtype": dtype}


class FeatureCache:
    """Rows of features by picture key.

    Args:
        identity: what the features depend on (`encoder_identity`); another identity is another folder.
        shape: (N, D_v) of a row.
        root: where the folders live, by default in the user's cache.
    """

    def __init__(self, identity: dict[str, Any], shape: tuple[int, int], root: Path | None = None) -> None:
        root = cache_folder() / "features" if root is None else root
        text = json.dumps({**identity, "shape": list(shape)}, sort_keys=True)
        self.shape, self.dtype = shape, DTYPES[identity["dtype"]]
        self.row_bytes = shape[0] * shape[1] * self.dtype.itemsize
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keys, self._features = self.folder / "keys.bin", self.folder / "features.bin"
        self._lock = FileLock(self.folder / "lock")
        self._rows: dict[bytes, int] = {}
        self._map: np.ndarray | None = None
        with naming_full_disk(self.folder):
            (self.folder / "identity.json").write_text(text)
        self._keys.touch()
        self._features.touch()
        prune(root, limit_gb(), keep=self.folder)
        self.refresh()

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, key: str) -> int | None:
        """The row of a picture, by its sha256 in hexadecimal; None where it was never encoded."""
        return self._rows.get(bytes.fromhex(key))

    def read(self, rows: Sequence[int]) -> Float[Tensor, "images N D_v"]:
        """Copies of rows."""
        if self._map is None:
            raise IndexError("the feature cache is empty")
        return torch.from_numpy(self._map[np.asarray(rows)]).view(self.dtype).view(len(rows), *self.shape)

    def add(self, keys: Sequence[str], features: Float[Tensor, "images N D_v"]) -> None:
        """Appends the features of pictures that are not there yet; other processes may do the same."""
        if tuple(features.shape) != (len(keys), *self.shape):
            raise ValueError(f"features are {tuple(features.shape)}, expected {(len(keys), *self.shape)}")
        with self._lock:
            self.refresh()
            new = {bytes.fromhex(key): place for place, key in enumerate(keys) if self.row(key) is None}
            if not new:
                return
            rows = features.detach()[list(new.values())].to("cpu", self.dtype).contiguous()
            _write(self._features, len(self) * self.row_bytes, rows.view(-1).view(torch.uint8).numpy().data)
            _write(self._keys, len(self) * KEY_BYTES, b"".join(new))
            self.refresh()

    def room(self) -> int:
        """Rows that the disk still has space for, a gigabyte left free."""
        return max(0, shutil.disk_usage(self.folder).free - 1_000_000_000) // self.row_bytes

    def refresh(self) -> None:
        """Takes note of rows that are on disk, whoever wrote them."""
        count = min(self._keys.stat().st_size // KEY_BYTES, self._features.stat().st_size // self.row_bytes)
        known = len(self._rows)
        if count == known:
            return
        with self._keys.open("rb") as file:
            file.seek(known * KEY_BYTES)
            keys = file.read((count - known) * KEY_BYTES)
        for row in range(known, count):
            start = (row - known) * KEY_BYTES
            self._rows[keys[start : start + KEY_BYTES]] = row
        self._map = np.memmap(self._features, np.uint8, "r", shape=(count, self.row_bytes))


def limit_gb() -> float:
    """Gigabytes that all caches may take, from `CHIASM_FEATURE_CACHE_GB`.

    Raises:
        ValueError: it is no number of gigabytes.
    """
    text = os.environ.get(LIMIT, str(DEFAULT_LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ValueError(f"{LIMIT} is {text!r}, expected a number of gigabytes, such as {DEFAULT_LIMIT_GB:g}")
    return limit


def prune(root: Path, limit_gb: float, keep: Path) -> list[Path]:
    """Removes the caches that were not used for the longest time until the rest takes at most `limit_gb`."""
    folders = [path.parent for path in root.glob("*/identity.json")]
    sizes = {folder: _size(folder) for folder in folders}
    removed = []
    for folder in sorted(folders, key=_last_use):
        if sum(sizes.values()) <= limit_gb * 1e9:
            break
        if folder != keep and time.time() - _last_use(folder) > PROTECTED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]
            removed.append(folder)
    return removed


def _last_use(folder: Path) -> float:
    return (folder / "identity.json").stat().st_mtime


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _write(path: Path, offset: int, data: Any) -> None:
    """Writes at an offset, cuts off whatever a killed process left behind it, and flushes to disk."""
    with naming_full_disk(path), path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
