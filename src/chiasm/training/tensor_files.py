"""Named tensors on disk: one safetensors file, or one for each process where they are sharded (DCP, resharded by name).

`weights.safetensors` holds whole tensors. A folder `weights/` holds the shards of all processes, written and read by
`torch.distributed.checkpoint` in the same format, so that any number of processes can read them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from chiasm.training.sharding import is_sharded

SUFFIX = ".safetensors"


def write_whole(place: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Whole tensors into one file."""
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, place / f"{name}{SUFFIX}")


def write_shards(place: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Every process's shards into a file of its own; all of them call this, and all raise what one of them met."""
    writer = dcp.HuggingFaceStorageWriter(str(place / name), save_distributed=True)
    try:
        dcp.save(_at_least_1d(tensors), storage_writer=writer)
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def names(place: Path, name: str) -> list[str]:
    """Names of the tensors that are there."""
    found: set[str] = set()
    for file in _files(place, name):
        with safe_open(file, framework="pt") as opened:
            found.update(opened.keys())
    return sorted(found)


@torch.no_grad()
def read_into(place: Path, name: str, into: dict[str, Tensor]) -> None:
    """Fills tensors, whole ones or shards, with those of the same names.

    Raises:
        ValueError: one is not there, or has another shape.
    """
    if (place / name).is_dir():
        reader = dcp.HuggingFaceStorageReader(str(place / name))
        with _one_line(place / name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(_at_least_1d(into), storage_reader=reader, no_dist=not is_sharded(into.values()))
        return
    with safe_open(place / f"{name}{SUFFIX}", framework="pt") as opened:
        for key, tensor in into.items():
            saved = opened.get_tensor(key)
            if saved.shape != tensor.shape:
                raise ValueError(f"{key} is {tuple(tensor.shape)} but was saved as {tuple(saved.shape)}")
            if isinstance(tensor, DTensor):
                saved = distribute_tensor(
                    saved.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
                )
            tensor.copy_(saved)


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except dcp.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise ValueError(f"the shards in {folder} do not fit this run: {' '.join(str(first).split())}") from error


def _files(place: Path, name: str) -> list[Path]:
    return sorted((place / name).glob(f"*{SUFFIX}")) if (place / name).is_dir() else [place / f"{name}{SUFFIX}"]


def _at_least_1d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same memory; safetensors cannot slice a tensor without dimensions."""
    return {key: tensor if tensor.ndim else tensor.view(1) for key, tensor in tensors.items()}
