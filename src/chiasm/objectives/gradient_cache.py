"""Large contrastive batches in the memory of small ones: the gradient of the whole batch (GradCache, arXiv 2101.06983).

Vectors of all chunks are computed without keeping activations; the loss compares them all; in the backward pass each
chunk is computed again, with the random numbers that it had, and takes the gradient of its vectors.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chiasm.objectives.processes import most_rows, reaching


def in_chunks(embed: Callable[..., Tensor], chunk: int | None, *inputs: Tensor | None) -> Tensor:
    """`embed(*inputs)`, row by row the same, with activations of at most `chunk` rows at a time. Every process goes
    through as many chunks as the one with most rows: a sharded model needs all of them each time.

    Args:
        embed: vectors of its inputs' rows, each by itself.
        chunk: rows; None computes all at once and keeps all activations.
        inputs: tensors with one row for each vector; None stays None.
    """
    given = next(tensor for tensor in inputs if tensor is not None)
    if chunk is None or not torch.is_grad_enabled() or (rows := most_rows(given)) <= chunk:
        return reaching(embed, *inputs)
    parts = [
        checkpoint(
            partial(reaching, embed),
            *(None if tensor is None else tensor[start : start + chunk] for tensor in inputs),
            use_reentrant=False,
        )
        for start in range(0, rows, chunk)
    ]
    return torch.cat(parts)
