"""Next-token prediction on supervised positions only: no logits are made where nothing is learned."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def supervised_positions(
    labels: Int[Tensor, "B S"], shift_labels: Int[Tensor, "B S"] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns whose next token is supervised, and those tokens: three vectors of length K.

    Args:
        shift_labels: in place of the labels, each one at its logits already, as trainers give that split sequences.
    """
    if shift_labels is not None:
        rows, columns = torch.nonzero(shift_labels != IGNORE, as_tuple=True)
        return rows, columns, shift_labels[rows, columns]
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORE, as_tuple=True)
    return rows, columns, labels[rows, columns + 1]


def next_token_loss(
    logits: Float[Tensor, "K V"],
    targets: Int[Tensor, " K"],
    num_items: Tensor | int | None = None,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy in float32, summed over K and divided by `num_items` (K itself when it is None).

    A `num_items` for the whole accumulated batch makes many small steps equal one large one. `z_loss` weighs the square
    of the softmax's logarithmic normaliser, which keeps logits from drifting (PaLM, arXiv 2204.02311).
    """
    count = max(targets.numel(), 1) if num_items is None else num_items
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    if z_loss:
        loss = loss + z_loss * logits.float().logsumexp(dim=-1).square().sum()
    return loss / count
