"""Two processes of a distributed run on this machine."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def results_of(process: Callable[[int, int, str], None], folder: Path) -> list[Any]:
    """What both processes saved in the folder, each under its rank."""
    torch.multiprocessing.spawn(process, (_free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@contextmanager
def joined(rank: int, port: int) -> Iterator[slice]:
    """While it lasts, this process works with the other one; the value is its part of five samples."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        yield slice(0, 3) if rank == 0 else slice(3, 5)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
