"""Rows of tokens of different lengths as one tensor, filled up on one side."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up; 0 where the tokenizer has none."""
    return tokenizer.pad_token_id or 0


def pad_rows(
    rows: Sequence[Sequence[int]], fill: int, side: str = "right", length: int | None = None
) -> Int[Tensor, "B S"]:
    """The rows, filled up to `length`; by default to the longest."""
    length = max(map(len, rows)) if length is None else length
    gaps = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor([[*gap, *row] if side == "left" else [*row, *gap] for gap, row in zip(gaps, rows, strict=True)])


def mask_rows(rows: Sequence[Sequence[int]], side: str = "right", length: int | None = None) -> Int[Tensor, "B S"]:
    """1 where such rows have tokens, 0 where they are filled up."""
    return pad_rows([[1] * len(row) for row in rows], 0, side, length)
