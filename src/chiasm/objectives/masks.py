"""Who may look at whom in a Q-Former: three self-attention masks over queries, then text (BLIP-2, arXiv 2301.12597).

Row i may look at column j where the mask is true; padding of the text is looked at by nobody.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def unimodal_mask(num_queries: int, text: Int[Tensor, "B L"]) -> Bool[Tensor, "B S S"]:
    """Queries see queries and text sees text: for the contrastive objective."""
    return _mask(num_queries, text, queries_see_text=False, text_sees_queries=False, causal=False)


def bidirectional_mask(num_queries: int, text: Int[Tensor, "B L"]) -> Bool[Tensor, "B S S"]:
    """Everyone sees everyone: for matching."""
    return _mask(num_queries, text, queries_see_text=True, text_sees_queries=True, causal=False)


def multimodal_causal_mask(num_queries: int, text: Int[Tensor, "B L"]) -> Bool[Tensor, "B S S"]:
    """Queries see queries, text sees the queries and earlier text: for grounded generation."""
    return _mask(num_queries, text, queries_see_text=False, text_sees_queries=True, causal=True)


def _mask(
    num_queries: int, text: Int[Tensor, "B L"], queries_see_text: bool, text_sees_queries: bool, causal: bool
) -> Bool[Tensor, "B S S"]:
    """`text` is the text's own attention mask: 1 for words, 0 for padding."""
    rows, length = text.shape
    mask = torch.ones(rows, num_queries + length, num_queries + length, dtype=torch.bool, device=text.device)
    mask[:, :num_queries, num_queries:] = queries_see_text
    mask[:, num_queries:, :num_queries] = text_sees_queries
    if causal:
        mask[:, num_queries:, num_queries:].tril_()
    mask[:, :, num_queries:] &= text.bool()[:, None]
    return mask
