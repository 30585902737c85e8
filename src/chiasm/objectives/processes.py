"""A batch that is spread over processes, seen as one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """While it lasts, a batch is this process's own: `gather` returns rows as they are."""
    token = ALONE.set(True)
    try:
        yield
    finally:
        ALONE.reset(token)


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, and how many stand before one's own; the gradient flows to one's own rows only.

    Processes may have different numbers of rows. Without `torch.distributed` the rows are returned as they are.
    """
    if _is_alone():
        return rows, 0
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = rows.detach().new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    own = dist.get_rank()
    parts = [
        rows if rank == own else part[:size] for rank, (part, size) in enumerate(zip(everyone, sizes, strict=True))
    ]
    return torch.cat(parts), sum(sizes[:own])


def most_rows(rows: Tensor) -> int:
    """The number of rows of the process that has most of them."""
    if _is_alone():
        return len(rows)
    count = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count)


def gather_with_gradient(rows: Tensor) -> tuple[Tensor, int]:
    """The same, and everyone's loss has a gradient for one's own rows: the sum over processes of the gradients is that
    of one process with the whole batch. All processes must call `backward` on what they made of it."""
    if _is_alone():
        return rows, 0
    return _Gather.apply(rows)


def reaching(embed: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """`embed(*inputs)`. Where this process has no rows, a row of ones goes through and none of it comes out: layers of
    transformers take no empty batch, and a sharded model needs all processes in every layer.

    Args:
        embed: something of its inputs' rows, each by itself.
        inputs: tensors with one row for each of its result; None stays None.
    """
    rows = next(len(tensor) for tensor in inputs if tensor is not None)
    if rows:
        return embed(*inputs)
    return embed(*(None if tensor is None else tensor.new_ones(1, *tensor.shape[1:]) for tensor in inputs))[:0]


def _is_alone() -> bool:
    return ALONE.get() or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, int]:
        everyone, first = gather(rows.detach())
        ctx.own = slice(first, first + len(rows))
        return everyone, first

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own]
