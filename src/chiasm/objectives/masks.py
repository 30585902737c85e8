"""Who may look at whom in a Q-Former that writes: queries, then text (BLIP-2, arXiv 2301.12597).

The paper's other two masks need no matrix: its unimodal one is two passes, its bidirectional one hides padding alone.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def multimodal_causal_mask(num_queries: int, text: Int[Tensor, "B L"]) -> Bool[Tensor, "B S S"]:
    """Queries see queries, text sees the queries and earlier text: for grounded generation.

    Row i may look at column j where the mask is true.

    Args:
        text: the text's own attention mask: 1 for words, 0 for padding, which nobody looks at.
    """
    rows, length = text.shape
    mask = torch.ones(rows, num_queries + length, num_queries + length, dtype=torch.bool, device=text.device)
    mask[:, :num_queries, num_queries:] = False
    mask[:, num_queries:, num_queries:].tril_()
    mask[:, :, num_queries:] &= text.bool()[:, None]
    return mask
