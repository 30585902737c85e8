"""Scaled dot-product attention that also returns its weights (arXiv 1706.03762)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def split_heads(tokens: Float[Tensor, "... S C"], heads: int) -> Float[Tensor, "... H S head_dim"]:
    return tokens.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attend(
    query: Float[Tensor, "... S C"],
    key: Float[Tensor, "... L C"],
    value: Float[Tensor, "... L C"],
    mask: Bool[Tensor, "... _ L"] | None = None,
) -> tuple[Float[Tensor, "... S C"], Float[Tensor, "... S L"]]:
    """What every query reads, and how much of it from where; softmax in float32.

    Args:
        mask: keys that may be read; a query that may read none reads all alike.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value), weights
