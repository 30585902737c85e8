"""What tells two runs apart: digests of weights, data and recipe."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.data.schema import ByteRange, ImageRef, Sample
from chiasm.training.sharding import local

THREADS, TOGETHER = 8, 64
CHUNK, IN_CACHE = 1 << 22, 1 << 16
"""Elements whose sums are kept in 64 bits, and as many of them as a CPU's cache holds."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(tensor: Tensor) -> tuple[int, int]:
    """Two 64-bit sums over a tensor's bits, the second weighted by position; computed where the tensor is.

    Fast rather than cryptographic: one pass at memory speed, to notice any change that training makes. Of a sharded
    tensor this process's part counts.
    """
    bits = local(tensor.detach()).contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    size = min(bits.numel(), IN_CACHE if bits.device.type == "cpu" else CHUNK)
    places = torch.arange(1, size + 1, device=bits.device)
    plain = weighted = 0
    for start in range(0, bits.numel(), CHUNK):
        sums = [0, 0]
        for first in range(start, min(start + CHUNK, bits.numel()), size):
            block = bits[first : min(first + size, start + CHUNK)].long()
            total = int(block.sum())
            sums[0] += total
            sums[1] += int((block * places[: block.numel()]).sum()) + first * total
        plain, weighted = plain + _signed(sums[0]), weighted + _signed(sums[1])
    return plain, weighted


def _signed(number: int) -> int:
    """A sum as 64 bits keep it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def model_fingerprint(model: nn.Module) -> str:
    """Of all weights and buffers, by name."""
    digester = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digester.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest(tensor)}\n".encode())
    return digester.hexdigest()


PictureFile = Path | ByteRange

BLOCK, BLOCKS = 4096, 4
"""Bytes of a block, and the blocks of a picture that are read to know it again; a small one is read whole."""


def sample_fingerprint(sample: Sample, files: dict[PictureFile, int]) -> bytes:
    """Of what a sample says and which pictures it shows, wherever their files lie now.

    Args:
        files: the distinct files of the samples so far by their number; the sample's own are added.
    """
    shown = [_shown(ref, files) for ref in sample.images]
    said = json.dumps([sample.id, sample.messages, shown], ensure_ascii=False)
    return hashlib.sha256(said.encode()).digest()


def _shown(ref: ImageRef, files: dict[PictureFile, int]) -> int | str:
    if isinstance(ref.source, Path | ByteRange):
        return files.setdefault(ref.source, len(files))
    if isinstance(ref.source, bytes):
        return _glance(io.BytesIO(ref.source), 0, len(ref.source)).hex()
    return ref.name


def files_fingerprint(files: Sequence[PictureFile], advance: Callable[[int], None]) -> str:
    """Of the content of picture files, by their sizes and a few blocks of each; `advance` is told how many are done."""
    digester = hashlib.sha256()
    parts = [files[start : start + TOGETHER] for start in range(0, len(files), TOGETHER)]
    with ThreadPoolExecutor(THREADS) as pool:
        for part, known_by in zip(parts, pool.map(lambda part: [*map(_file_fingerprint, part)], parts), strict=True):
            digester.update(b"".join(known_by))
            advance(len(part))
    return digester.hexdigest()


def _file_fingerprint(source: PictureFile) -> bytes:
    path, start, size = (source, 0, None) if isinstance(source, Path) else (source.path, source.offset, source.length)
    try:
        with path.open("rb", buffering=0) as file:
            return _glance(file, start, os.fstat(file.fileno()).st_size if size is None else size)
    except OSError as error:
        return hashlib.sha256(type(error).__name__.encode()).digest()


def _glance(file: io.RawIOBase | io.BytesIO, start: int, size: int) -> bytes:
    digester, last = hashlib.sha256(f"{size}\n".encode()), max(0, size - BLOCK)
    places = range(0, size, BLOCK) if size <= BLOCK * BLOCKS else [last * n // (BLOCKS - 1) for n in range(BLOCKS)]
    for place in places:
        file.seek(start + place)
        digester.update(file.read(min(BLOCK, size - place)) or b"")
    return digester.digest()


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    """Paths at which two nested plain values differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line for key in keys for line in differences(before.get(key), after.get(key), f"{at}.{key}".lstrip("."))
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line
            for index, (one, other) in enumerate(zip(before, after, strict=True))
            for line in differences(one, other, f"{at}.{_name(one, index)}")
        ]
    return [] if before == after else [f"{at} was {_short(before)}, is {_short(after)}"]


def _name(value: Any, index: int) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(index)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
